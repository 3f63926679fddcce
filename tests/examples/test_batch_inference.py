"""The example of batch inference, through a real engine that is killed on the way.

What it keeps is also tested without one, by runs that are killed wherever they open, rename or
remove a file, and by journals that are cut anywhere.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from support import batches
from support.engine import NEW_TOKENS, PROMPTS, engine_environment
from support.models import load_model
from support.packed import pack_mixed
from support.reference import dequantize_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "batch_inference.py"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
ROUNDS = 8
BAD = {
    "not json": "JSONDecodeError",
    '{"prompt": "a", "colour": 1}': "unknown field 'colour'",
    '{"id": "both", "prompt": "a", "messages": []}': "either a prompt or messages",
    json.dumps({"id": "long", "prompt": "a" * 200}): "128",
    json.dumps({"id": "\ud83d", "prompt": ["a"]}): "a prompt is a string",
    json.dumps({"messages": [{"role": "user", "content": [{"text": "a"}]}]}): "both strings",
    '{"prompt": "\xff"}': "UnicodeDecodeError",
}


@pytest.mark.slow
@pytest.mark.vllm
def test_a_killed_run_goes_on_without_a_duplicate_or_a_gap(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    packed = pack_mixed(tiny_model("mixtral"), tmp_path / "packed")
    (packed / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    texts = [bytes(tokens).decode() for tokens in PROMPTS]
    good: list[dict[str, Any]] = []
    for number in range(ROUNDS):
        good += [{"id": f"p{number}.{i}", "prompt": text} for i, text in enumerate(texts)]
        good += [{"messages": [{"role": "user", "content": text}]} for text in texts]
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    requests.write_bytes("\n".join([*BAD, "", *map(json.dumps, good)]).encode("latin-1") + b"\n")
    command = [
        sys.executable, str(EXAMPLE), str(packed), str(requests), str(results), "--dtype=float32",
        f"--max-tokens={NEW_TOKENS}", "--max-model-len=128", "--enforce-eager", "--in-flight=2",
    ]  # fmt: skip
    environment = engine_environment(VLLM_ENABLE_V1_MULTIPROCESSING="1")

    part = tmp_path / "results.jsonl.part"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        while process.poll() is None and not (part.exists() and len(_lines(part)) > len(BAD) + 6):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = _lines(part)[1:]
    assert 0 < len(kept) < len(good), (tmp_path / "log").read_text()[-3000:]
    assert not results.exists()
    with part.open("a") as file:
        file.write('{"line": 99, "te')  # the kill can come in the middle of a line

    other = subprocess.run(
        [*command, "--temperature=1"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "of a run with another temperature" in other.stderr
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exited unexpectedly" not in done.stderr  # so says vLLM of an engine nobody shut down

    found = [json.loads(line) for line in _lines(results)]
    assert not part.exists()
    first = len(BAD) + 2
    assert [entry["line"] for entry in found] == list(range(first, first + len(good)))
    assert [entry.get("id") for entry in found] == [entry.get("id") for entry in good]
    finished = [entry for entry in map(json.loads, kept) if "error" not in entry]
    assert finished and all(entry in found for entry in finished)
    model = load_model(dequantize_checkpoint(packed, tmp_path / "plain"))
    for i, entry in enumerate(found):
        prompt = tokenizer(texts[i % len(texts)], return_tensors="pt").input_ids
        (tokens,) = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[
            :, prompt.shape[1] :
        ]
        assert entry["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert entry["completion_tokens"] == len(tokens)
    failed = [json.loads(line) for line in _lines(tmp_path / "results.errors.jsonl")]
    assert [entry["line"] for entry in failed] == list(range(1, len(BAD) + 1))
    assert [entry.get("id") for entry in failed] == [
        None,
        None,
        "both",
        "long",
        "\ud83d",
        None,
        None,
    ]
    for entry, message in zip(failed, BAD.values(), strict=True):
        assert message in entry["error"]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with seven requests and the files of a model."""
    requests = "".join(f'{{"prompt": "{number}"}}\n' for number in range(1, 8))
    (tmp_path / "requests.jsonl").write_text(requests)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def _check_and_remove(folder: Path) -> None:
    """Check the only files of a run that is complete."""
    for name, numbers in (("results.jsonl", (1, 2, 4, 5, 7)), ("results.errors.jsonl", (3, 6))):
        assert tuple(json.loads(line)["line"] for line in _lines(folder / name)) == numbers
        (folder / name).unlink()
    assert sorted(path.name for path in folder.iterdir()) == ["model", "requests.jsonl"]


def test_a_run_killed_at_any_step_goes_on_with_the_same_command(folder: Path) -> None:
    for last in itertools.count(1):
        command = [sys.executable, batches.__file__, str(folder), str(last)]
        status = subprocess.run(command, check=False).returncode
        if status == 0:
            break
        assert status == -signal.SIGKILL
        batches.complete(folder)
        _check_and_remove(folder)
    assert last > 5
    _check_and_remove(folder)


def test_an_engine_that_outlives_a_killed_run_does_not_block_the_next(folder: Path) -> None:
    forks = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from support import batches

        async def answer(options, journal, total):
            running, told = os.pipe()
            if os.fork():
                os.read(running, 1)
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(told, b"1")
            sys.stdin.read()
            os._exit(0)

        batches.complete(Path(sys.argv[1]), answer)
    """)
    command = [sys.executable, "-c", forks, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(batches.__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        assert process.wait() == -signal.SIGKILL  # its child lives until this block ends
        batches.complete(folder)
    _check_and_remove(folder)


def test_a_journal_that_ends_anywhere_is_gone_on_with(folder: Path) -> None:
    part, whole = folder / "results.jsonl.part", list[bytes]()

    async def answer(
        options: argparse.Namespace, journal: batches.batch_inference.Journal, total: int
    ) -> None:
        await batches.answer(options, journal, total)
        whole.append(part.read_bytes())

    batches.complete(folder, answer)
    _check_and_remove(folder)
    ends = itertools.accumulate(map(len, whole[0].splitlines(keepends=True)), initial=0)
    for end, more in itertools.product(ends, (-30, -1, 0, 1)):
        part.write_bytes(whole[0][: max(end + more, 0)])
        batches.complete(folder)
        _check_and_remove(folder)


def test_a_model_that_is_not_there_does_not_block_the_next_run(folder: Path) -> None:
    async def cannot_start(*_: object) -> None:
        raise ValueError("no such kernel")

    with pytest.raises(SystemExit, match="absent is no folder, and the hub does not give"):
        batches.complete(folder, model=str(folder / "absent"))
    with pytest.raises(ValueError, match="no such kernel"):
        batches.complete(folder, cannot_start, dtype="float8")
    assert sorted(path.name for path in folder.iterdir()) == ["model", "requests.jsonl"]
    batches.complete(folder)
    _check_and_remove(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "moeq_manifest.json"])
def test_another_model_at_the_same_path_is_another_model(name: str, folder: Path) -> None:
    if name.startswith("moeq"):
        (folder / "model" / name).write_text('{"sha256": "0"}')
    _stop_after(folder, 3)
    before = (folder / "results.jsonl.part").read_bytes()
    file = folder / "model" / name
    content = file.read_bytes()
    times = file.stat()
    file.write_bytes(content.replace(b"0", b"1") if b"0" in content else content + b" ")
    with pytest.raises(SystemExit, match="is of a run with another model: finish that, or delete"):
        batches.complete(folder)
    assert (folder / "results.jsonl.part").read_bytes() == before
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    (folder / "model").rename(folder / "moved")  # not a name, but files tell what it is
    batches.complete(folder, model=str(folder / "moved"))
    (folder / "moved").rename(folder / "model")
    _check_and_remove(folder)


def test_weights_written_again_are_another_model_unless_a_manifest_has_their_hashes(
    folder: Path,
) -> None:
    identity = batches.batch_inference.identity
    model = folder / "model"
    before = identity(str(model), None)
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert identity(str(model), None) != before
    (model / "moeq_manifest.json").write_text("{}")
    before = identity(str(model), None)
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert identity(str(model), None) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 5), ("temperature", 1.0), ("seed", 1), ("dtype", "float32"),
        ("kv_cache_dtype", "fp8"), ("quantization", "moeq"), ("load_format", "dummy"),
        ("max_model_len", 64), ("hf_overrides", {"rope_theta": 1.0}), ("vllm_version", "0.33.0"),
        ("MOEQ_CPU_ACTIVATION", "int8"),
    ],
)  # fmt: skip
def test_a_run_does_not_go_on_with_options_that_change_results(
    name: str, value: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOEQ_CPU_ACTIVATION", raising=False)
    _stop_after(folder, 3)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"another {name}: finish"):
        if name.isupper():
            patch.setenv(name, str(value))
            batches.complete(folder)
        else:
            batches.complete(folder, batches.answer, **{name: value})
    batches.complete(folder)
    _check_and_remove(folder)


def test_results_are_on_the_disk_before_the_journal_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = list[tuple[str, bool]](), os.fsync
    results, part = folder / "results.jsonl", folder / "results.jsonl.part"

    def recorded(file: int) -> None:
        fsync(file)
        path = Path(f"/proc/self/fd/{file}").readlink()
        whole = path.is_dir() or path.stat().st_size > 0
        assert part.exists() and whole
        synced.append((path.name, results.exists()))

    monkeypatch.setattr(os, "fsync", recorded)
    batches.complete(folder)
    assert synced == [
        ("results.jsonl.unfinished", False),
        ("results.errors.jsonl.unfinished", False),
        (folder.name, True),
    ]
    _check_and_remove(folder)


def test_a_result_that_cannot_be_written_leaves_the_journal_whole(folder: Path) -> None:
    asked, path = {"model": "m"}, folder / "results.jsonl.part"
    with batches.batch_inference.Journal(path, asked) as journal:
        for _ in range(2):
            with pytest.raises(TypeError, match="not JSON serializable"):
                journal.add({"line": 1, "text": object()})
        journal.add({"line": 2})
        assert [json.loads(line) for line in _lines(path)] == [asked, {"line": 2}]


def test_a_damaged_journal_is_named_with_what_to_do(folder: Path) -> None:
    part = folder / "results.jsonl.part"
    _stop_after(folder, 3)
    lines = _lines(part)
    for number, damage, remedy in (
        (3, lines[2][:-4], "delete this line, and its request is completed again"),
        (3, "{}", "delete this line"),
        (3, '{"line": "2"}', "delete this line"),
        (2, "7", "delete this line"),
        (1, "\0\0", "delete the file"),
        (1, "[]", "delete the file"),
    ):
        damaged = [*lines[: number - 1], damage, *lines[number:]]
        part.write_text("\n".join(damaged) + "\n")
        with pytest.raises(SystemExit, match=f"{part}, line {number} is damaged: {remedy}"):
            batches.complete(folder)
    part.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    batches.complete(folder)
    _check_and_remove(folder)


@pytest.mark.parametrize("name", ["results.jsonl", "results.errors.jsonl"])
def test_files_of_others_in_the_place_of_results_stay(name: str, folder: Path) -> None:
    file = folder / name
    file.write_text("mine")
    with pytest.raises(SystemExit, match=f"{name} exists already"):
        batches.complete(folder)
    assert not (folder / "results.jsonl.part").exists()
    file.unlink()

    async def answer(
        options: argparse.Namespace, journal: batches.batch_inference.Journal, total: int
    ) -> None:
        await batches.answer(options, journal, total)
        file.write_text("mine")

    for _ in range(2):
        with pytest.raises(SystemExit, match=f"{name} exists already"):
            batches.complete(folder, answer)
        assert file.read_text() == "mine"
    file.unlink()
    batches.complete(folder)
    _check_and_remove(folder)


def _stop_after(folder: Path, number: int) -> None:
    """Leave a run that was stopped when so many requests were finished."""

    async def answer(
        options: argparse.Namespace, journal: batches.batch_inference.Journal, total: int
    ) -> None:
        for line in range(1, number + 1):
            journal.add({"line": line} | ({"error": "bad"} if line % 3 == 0 else {}))
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        batches.complete(folder, answer)
