"""Complete many prompts at once, without a server.

    python examples/batch_inference.py MODEL REQUESTS.jsonl RESULTS.jsonl

MODEL is a packed checkpoint, or any model that vLLM runs. A line of REQUESTS is one of

    {"prompt": "Once upon a time"}
    {"id": "q7", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 100}

and may have its own max_tokens, temperature, top_p, seed and stop. Lines of RESULTS have the order
of their requests. Requests that failed are in RESULTS.errors.jsonl, each with the reason.

A run that was killed goes on with the same command: what it has finished is in RESULTS.jsonl.part.
It resumes only with the same requests, model (compared by files or hub commit, not by name) and
options that change results.
Options of vLLM (--max-model-len, --data-parallel-size, ...) are taken as they are.
"""

import argparse
import asyncio
import fcntl
import filecmp
import hashlib
import inspect
import json
import operator
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

SAMPLING = ("max_tokens", "temperature", "top_p", "seed", "stop")
KNOWN = {"id", "prompt", "messages", *SAMPLING}
DECISIVE = (
    "max_tokens", "temperature", "seed", "dtype", "kv_cache_dtype", "quantization", "load_format",
    "max_model_len", "hf_overrides", "vllm_version",
)  # fmt: skip
"""Options on which results depend: a run cannot go on with others."""
TEXTS = {".json", ".jinja", ".model", ".txt"}
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
MANIFEST = "moeq_manifest.json"
"""Of packed checkpoints: has a hash of every file."""


class Journal:
    """What a run has finished, in a file that survives its end.

    Its first line says what the run was asked; another one cannot go on with it. Every other line
    is a result with the number of its request. A file without a result is of no run.

    Args:
        path: Made if it is not there; removed at the end if there is no result.
        asked: What results depend on, as JSON.

    Raises:
        SystemExit: The file is of another run, in use, or damaged.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self._asked = path, asked
        self._places: dict[int, int] = {}
        self._file = self._locked()
        os.register_at_fork(after_in_child=self._file.close)  # an orphan would keep the lock
        try:
            self._read()
        except SystemExit:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._places:
            self.path.unlink()
        self._file.close()

    def __contains__(self, line: int) -> bool:
        return line in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a result."""
        if not self._file.seek(0, os.SEEK_END):
            self._write(self._asked)
        self._places[entry["line"]] = self._write(entry)

    def finish(self, results: Path, errors: Path) -> int:
        """Write results and errors in the order of their requests; return the number of errors.

        A run that was killed in here does it again.

        Raises:
            SystemExit: There is another file in the place of one of them.
        """
        failed = 0
        names = [path.with_name(path.name + ".unfinished") for path in (results, errors)]
        with names[0].open("wb") as good, names[1].open("wb") as bad:
            for _, place in sorted(self._places.items()):
                self._file.seek(place)
                line = self._file.readline()
                is_error = "error" in json.loads(line)
                failed += is_error
                (bad if is_error else good).write(line)
            for file in (good, bad):
                file.flush()
                os.fsync(file.fileno())
        wanted = dict(zip(names, (results, errors), strict=True))
        if not failed:
            names[1].unlink()
            del wanted[names[1]]
        for name, path in wanted.items():
            if path.exists() and not filecmp.cmp(name, path, shallow=False):
                sys.exit(f"{path} exists already; move it, then give the same command")
        for name, path in reversed(wanted.items()):
            name.replace(path)
        folder = os.open(results.parent, os.O_RDONLY)
        os.fsync(folder)  # the names too are on the disk before the journal is removed
        os.close(folder)
        self._places.clear()
        return failed

    def _locked(self) -> BinaryIO:
        while True:
            file = self.path.open("a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"{self.path} is in use by another run")
            except OSError as error:
                sys.exit(
                    f"{self.path} cannot be locked ({error}): write to a file system that has locks"
                )
            # A run that ended just now may have removed the file that was opened.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            file.close()

    def _read(self) -> None:
        found, place = self._asked, 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):  # a kill can leave the last line without its end
                self._file.truncate(place)
                break
            try:
                entry = json.loads(line)
                if number == 1:
                    found = {**entry}
                else:
                    self._places[operator.index(entry["line"])] = place
            except (ValueError, TypeError, KeyError):
                redone = "this line, and its request is completed again"
                what = "the file" if number == 1 else redone
                sys.exit(f"{self.path}, line {number} is damaged: delete {what}")
            place += len(line)
        if not self._places:
            self._file.truncate(0)
        elif found != self._asked:
            names = dict.fromkeys([*self._asked, *found])
            changed = ", ".join(n for n in names if self._asked.get(n) != found.get(n))
            sys.exit(f"{self.path} is of a run with another {changed}: finish that, or delete it")

    def _write(self, entry: dict[str, Any]) -> int:
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        return place


Run = Callable[[argparse.Namespace, Journal, int], Coroutine[Any, Any, None]]
"""Completes those of so many requests that a journal does not have."""


def arguments() -> argparse.Namespace:
    """Return our own options and those of vLLM's engine."""
    from vllm import AsyncEngineArgs, __version__
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="MODEL")
    parser.add_argument("requests", type=Path, metavar="REQUESTS", help="JSON lines, see above")
    parser.add_argument("results", type=Path, metavar="RESULTS", help="JSON lines, to be made")
    parser.add_argument("--max-tokens", type=int, default=256, help="of each completion")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--in-flight", type=int, default=1024, help="requests in vLLM at once")
    options = AsyncEngineArgs.add_cli_args(parser).parse_args()
    options.model, options.vllm_version = options.checkpoint, __version__
    if options.in_flight < 1:
        parser.error(f"--in-flight {options.in_flight} must be at least 1")
    return options


def check(request: Any) -> None:
    """Check a request.

    Raises:
        ValueError: It is none; says why.
    """
    if not isinstance(request, dict):
        raise ValueError("a request is a JSON object")
    if unknown := sorted(request.keys() - KNOWN):
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(KNOWN))}")
    if ("prompt" in request) == ("messages" in request):
        raise ValueError("a request has either a prompt or messages")
    if not isinstance(request.get("prompt", ""), str):
        raise ValueError("a prompt is a string")
    messages = request.get("messages", [])
    if not isinstance(messages, list) or not all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise ValueError("messages are a list of objects with role and content, both strings")


async def complete(
    engine: Any, tokenizer: Any, number: int, text: bytes, defaults: dict[str, Any]
) -> dict[str, Any]:
    """Return the result of a request, or an entry with what is wrong with it.

    Raises:
        RuntimeError: The engine was stopped in the middle of it.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    entry: dict[str, Any] = {"line": number}
    try:
        request = json.loads(text)
        if isinstance(request, dict) and "id" in request:
            entry["id"] = request["id"]
        check(request)
        if "messages" in request:
            prompt = tokenizer.apply_chat_template(
                request["messages"], add_generation_prompt=True, tokenize=False
            )
            tokens = tokenizer.encode(prompt, add_special_tokens=False)
        else:
            tokens = tokenizer.encode(request["prompt"])
        sampling = SamplingParams(
            **defaults | {name: request[name] for name in SAMPLING if name in request},
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        outputs = engine.generate({"prompt_token_ids": tokens}, sampling, str(number))
        completion = [output async for output in outputs][-1].outputs[0]
        if completion.finish_reason == "error":
            raise RuntimeError("vLLM could not finish this request")
    except Exception as error:  # whatever is wrong with one request, the others go on
        if engine.errored:
            raise
        return entry | {"error": f"{type(error).__name__}: {error}"}
    if completion.finish_reason == "abort":
        raise RuntimeError("the engine was stopped")
    return entry | {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(tokens),
        "completion_tokens": len(completion.token_ids),
    }


async def run(options: argparse.Namespace, journal: Journal, total: int) -> None:
    """Complete all requests that the journal does not have."""
    from tqdm import tqdm
    from vllm import AsyncEngineArgs, AsyncLLMEngine

    defaults = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs.from_cli_args(options))
    tokenizer = engine.get_tokenizer()
    if inspect.isawaitable(tokenizer):  # in older releases
        tokenizer = await tokenizer
    room = asyncio.Semaphore(options.in_flight)
    bar = tqdm(total=total, initial=len(journal), unit="request")
    started, tokens = time.monotonic(), 0

    async def one(number: int, text: bytes) -> None:
        nonlocal tokens
        entry = await complete(engine, tokenizer, number, text, defaults)
        journal.add(entry)
        room.release()
        tokens += entry.get("completion_tokens", 0)
        bar.set_postfix({"tokens/s": f"{tokens / (time.monotonic() - started):.0f}"}, refresh=False)
        bar.update()

    try:
        async with asyncio.TaskGroup() as tasks:
            for number, text in numbered(options.requests):
                if number not in journal:
                    await room.acquire()
                    tasks.create_task(one(number, text))
    finally:
        bar.close()
        engine.shutdown()


def numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not empty with their numbers, from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def identity(model: str, revision: str | None) -> str:
    """Return what tells a model from others that had its name before.

    Of a folder or a file: a hash of the configuration, index, manifest and tokenizer, and of sizes
    and times of weights; of a model of the hub: its commit.

    Raises:
        SystemExit: There is no such model.
    """
    path = Path(model)
    if not path.exists():
        from huggingface_hub import snapshot_download

        try:
            cached = snapshot_download(model, revision=revision, allow_patterns=["*.json"])
        except (OSError, ValueError) as error:
            sys.exit(
                f"{model} is no folder, and the hub does not give a model of that name: {error}"
            )
        return f"commit {Path(cached).name}"
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        about: list[object] = [file.name]
        if file.suffix in TEXTS:
            about.append(hashlib.sha256(file.read_bytes()).hexdigest())
        elif file.suffix in WEIGHTS:
            about.append(file.stat().st_size)
            if not (path / MANIFEST).exists():
                about.append(file.stat().st_mtime_ns)
        else:
            continue
        digest.update(json.dumps(about).encode())
    return f"sha256 {digest.hexdigest()}"


def complete_all(options: argparse.Namespace, run: Run) -> None:
    """Complete all requests, or go on where an earlier run has ended.

    Args:
        options: Ours and the engine's.
        run: With the engine of the options.

    Raises:
        SystemExit: It cannot begin or go on; says why.
    """
    results, requests = options.results, options.requests
    if not requests.is_file():
        sys.exit(f"{requests} is no file: REQUESTS are JSON lines, see --help")
    if not results.parent.is_dir():
        sys.exit(f"{results.parent} is no folder: make it, or choose another place for RESULTS")
    stem = results.stem if results.suffix == ".jsonl" else results.name
    errors, part = (
        results.with_name(name) for name in (f"{stem}.errors.jsonl", f"{results.name}.part")
    )
    with requests.open("rb") as file:
        asked = {"requests": hashlib.file_digest(file, "sha256").hexdigest()}
    asked["model"] = identity(options.model, options.revision)
    if options.tokenizer:
        asked["tokenizer"] = identity(options.tokenizer, options.tokenizer_revision)
    asked |= {name: str(getattr(options, name)) for name in DECISIVE}
    asked["MOEQ_CPU_ACTIVATION"] = os.environ.get("MOEQ_CPU_ACTIVATION", "")
    total = sum(1 for _ in numbered(requests))
    with Journal(part, asked) as journal:
        if len(journal) < total:
            for path in (results, errors):
                if path.exists():
                    sys.exit(f"{path} exists already; remove it or choose another name for RESULTS")
            try:
                asyncio.run(run(options, journal, total))
            except KeyboardInterrupt:
                print("stopped; the same command goes on", file=sys.stderr)
                sys.exit(130)
            except ExceptionGroup as group:
                sys.exit(
                    f"stopped by {group.exceptions[0]!r}; what is finished is in {part}, and the "
                    "same command goes on"
                )
        failed = journal.finish(results, errors)
    print(f"{total - failed} of {total} requests completed: {results}")
    if failed:
        print(f"{failed} failed: {errors}", file=sys.stderr)


if __name__ == "__main__":
    complete_all(arguments(), run)
