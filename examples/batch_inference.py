"""Complete many prompts at once, without a server.

    python examples/batch_inference.py MODEL REQUESTS.jsonl RESULTS.jsonl

MODEL is a packed checkpoint, or any model that vLLM runs. A line of REQUESTS is one of

    {"prompt": "Once upon a time"}
    {"id": "q7", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 100}

and may have its own max_tokens, temperature, top_p, seed and stop. Lines of RESULTS have the order
of their requests. Requests that failed are in RESULTS.errors.jsonl, each with the reason.

A run that was killed goes on with the same command: what it has finished is in RESULTS.jsonl.part.
Options of vLLM (--max-model-len, --data-parallel-size, ...) are taken as they are.
"""

import argparse
import asyncio
import fcntl
import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

SAMPLING = ("max_tokens", "temperature", "top_p", "seed", "stop")
KNOWN = {"id", "prompt", "messages", *SAMPLING}
DECISIVE = ("max_tokens", "temperature", "tokenizer", "revision", "dtype", "quantization", "seed")
"""Options on which results depend: a run cannot go on with others."""


class Journal:
    """What a run has finished, in a file that survives its end.

    Its first line says what the run was asked; another one cannot go on with it. Every other line
    is a result with the number of its request.

    Args:
        path: Made if it is not there.
        asked: What results depend on, as JSON.

    Raises:
        SystemExit: The file is of another run, or in use.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path = path
        self._file: BinaryIO = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{path} is in use by another run")
        except OSError as error:
            sys.exit(f"{path} cannot be locked ({error}): write to a file system that has locks")
        self._drop_torn_line()
        self._places: dict[int, int] = {}
        if not self._file.seek(0, os.SEEK_END):
            self._write(asked)
        for place, entry in self._entries():
            if place:
                self._places[entry["line"]] = place
            elif entry != asked:
                changed = ", ".join(name for name in asked if asked[name] != entry.get(name))
                sys.exit(f"{path} is of a run with another {changed}: finish that, or delete it")

    def __contains__(self, line: int) -> bool:
        return line in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a result."""
        self._places[entry["line"]] = self._write(entry)

    def finish(self, results: Path, errors: Path) -> int:
        """Write results and errors in the order of their requests; return the number of errors."""
        failed = 0
        names = [path.with_name(path.name + ".unfinished") for path in (results, errors)]
        with names[0].open("wb") as good, names[1].open("wb") as bad:
            for _, place in sorted(self._places.items()):
                self._file.seek(place)
                line = self._file.readline()
                is_error = "error" in json.loads(line)
                failed += is_error
                (bad if is_error else good).write(line)
        if failed:
            names[1].replace(errors)
        else:
            names[1].unlink()
        names[0].replace(results)
        self.path.unlink()
        return failed

    def _write(self, entry: dict[str, Any]) -> int:
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        return place

    def _entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self._file.seek(0)
        place = 0
        for line in self._file:
            yield place, json.loads(line)
            place += len(line)

    def _drop_torn_line(self) -> None:
        """A kill can leave the last line without its end."""
        self._file.seek(0)
        whole = sum(len(line) for line in self._file if line.endswith(b"\n"))
        self._file.truncate(whole)


def arguments() -> argparse.Namespace:
    """Return our own options and those of vLLM's engine."""
    from vllm import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="MODEL")
    parser.add_argument("requests", type=Path, metavar="REQUESTS", help="JSON lines, see above")
    parser.add_argument("results", type=Path, metavar="RESULTS", help="JSON lines, to be made")
    parser.add_argument("--max-tokens", type=int, default=256, help="of each completion")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token"
    )
    parser.add_argument(
        "--in-flight", type=int, default=1024, help="requests given to vLLM at once"
    )
    options = AsyncEngineArgs.add_cli_args(parser).parse_args()
    options.model = options.checkpoint
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


def main() -> None:
    """Complete all requests, or go on where an earlier run has ended."""
    options = arguments()
    results, requests = options.results, options.requests
    if not requests.is_file():
        sys.exit(f"{requests} is no file: REQUESTS are JSON lines, see --help")
    if not results.parent.is_dir():
        sys.exit(f"{results.parent} is no folder: make it, or choose another place for RESULTS")
    stem = results.stem if results.suffix == ".jsonl" else results.name
    errors, part = (
        results.with_name(name) for name in (f"{stem}.errors.jsonl", f"{results.name}.part")
    )
    for path in (results, errors):
        if path.exists() and (path is results or not part.exists() or path.samefile(requests)):
            sys.exit(f"{path} exists already; remove it or choose another name for RESULTS")
    with requests.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    asked = {"requests (sha256)": digest} | {
        name: str(getattr(options, name)) for name in ("model", *DECISIVE)
    }
    journal = Journal(part, asked)
    total = sum(1 for _ in numbered(requests))
    if len(journal) < total:
        try:
            asyncio.run(run(options, journal, total))
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)
        except ExceptionGroup as errors_of_tasks:
            sys.exit(
                f"stopped by {errors_of_tasks.exceptions[0]!r}; what is finished is in {part}, and "
                "the same command goes on"
            )
    failed = journal.finish(results, errors)
    print(f"{total - failed} of {total} requests completed: {results}")
    if failed:
        print(f"{failed} failed: {errors}", file=sys.stderr)


if __name__ == "__main__":
    main()
