"""Checkpoints with one thing in them that is not true, and a guard around what reads them."""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

from hypothesis import strategies as st

from vllm_moeq.format import write_manifest

MANIFEST = "moeq_manifest.json"
_HOLE = "a hole to be filled"
_DEEP = 500
_SECONDS = 20
_ADDRESS_SPACE = 1 << 31
VALUES = (
    "null", "true", "0", "-1", "1", "3", "4294967297", "9223372036854775808", "1" + "0" * 30,
    "1" + "0" * 5000, "0.5", "1e999", "NaN", "-Infinity", '""', '"x"', '"../canary.safetensors"',
    '"/etc/passwd"', '"a\\u0000b"', '"\\ud800"', '"' + "x" * 5000 + '"', "[]", "{}", "[[]]",
    "[0, 0]",     '{"": null}', "[" * _DEEP + "]" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP, "",
)  # fmt: skip
"""JSON, as text: some of it no JSON library would write."""
KEYS = (
    "", "x", "../canary.safetensors", "/etc/passwd", "a\0b", "\ud800", "x" * 5000,
    "model.layers.0.block_sparse_moe.experts.99999999999999999999.w1.weight_scale",
    "model.layers.1000000000000.block_sparse_moe.experts",
    "model.layers." + "9" * 5000 + ".block_sparse_moe.experts",
)  # fmt: skip


class Lie(NamedTuple):
    """What is wrong with a file.

    Attributes:
        file: Its name.
        action: Replace, rename or remove an entry of its JSON; cut it off, or change a byte of it,
            after a share of it in per mille; or tell another length of a safetensors header.
        path: Keys down to the entry.
        text: JSON to put there, the new key, per mille, or the length.
        hidden: Whether the manifest knows nothing of it.
    """

    file: str
    action: Literal["value", "key", "remove", "cut", "flip", "length"]
    path: tuple[str | int, ...]
    text: str = ""
    hidden: bool = True


class Escape(BaseException):
    """Something that no reader of a checkpoint may do, or that takes too long."""


def lies(folder: Path, *patterns: str) -> st.SearchStrategy[Lie]:
    """Return lies about those files of a folder whose names match."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    assert files
    of_files = []
    for path in files:
        name, hidden = st.just(path.name), st.booleans()
        share = st.integers(0, 999).map(str)
        bytes_of = st.builds(
            Lie, name, st.sampled_from(["cut", "flip"]), st.just(()), share, hidden
        )
        lengths = st.sampled_from(["0", "1", str(1 << 20), str(1 << 60), str((1 << 64) - 1)])
        entries = st.sampled_from(_paths(_json(path)))
        values = st.builds(Lie, name, st.just("value"), entries, st.sampled_from(VALUES), hidden)
        inner = entries.filter(lambda keys: bool(keys) and isinstance(keys[-1], str))
        keys = st.builds(Lie, name, st.just("key"), inner, st.sampled_from(KEYS), hidden)
        removed = st.builds(Lie, name, st.just("remove"), inner, st.just(""), hidden)
        of_file = [values, values, keys, removed, bytes_of]
        if path.suffix == ".safetensors":
            of_file.append(st.builds(Lie, name, st.just("length"), st.just(()), lengths, hidden))
        of_files.append(st.one_of(of_file))
    return st.one_of(of_files)


def tell(lie: Lie, folder: Path) -> None:
    """Change a file of a folder, and its manifest if the lie is to stay hidden."""
    path = folder / lie.file
    content = path.read_bytes()
    if lie.action in ("cut", "flip"):
        place = len(content) * int(lie.text) // 1000
        rest = content[place + 1 :] if lie.action == "flip" else b""
        flipped = bytes([content[place] ^ 0x55]) if lie.action == "flip" else b""
        path.write_bytes(content[:place] + flipped + rest)
    elif lie.action == "length":
        path.write_bytes(int(lie.text).to_bytes(8, "little") + content[8:])
    else:
        text = told(_json(path), lie)
        if path.suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        else:
            path.write_bytes(text)
    if lie.hidden and lie.file != MANIFEST and (folder / MANIFEST).exists():
        write_manifest(folder)


def every_lie(data: Any) -> Iterator[str]:
    """Yield JSON with each of its entries in turn replaced by each of :data:`VALUES`."""
    for path in _paths(data):
        for text in VALUES:
            yield told(json.loads(json.dumps(data)), Lie("", "value", path, text)).decode()


def told(data: Any, lie: Lie) -> bytes:
    """Return JSON with an entry replaced, renamed or removed."""
    if not lie.path:
        return lie.text.encode(errors="surrogatepass")
    inner = data
    for key in lie.path[:-1]:
        inner = inner[key]
    last = lie.path[-1]
    if lie.action == "value":
        inner[last] = _HOLE
    else:
        value = inner.pop(last)
        if lie.action == "key":
            inner[lie.text] = value
    return json.dumps(data).replace(f'"{_HOLE}"', lie.text).encode()


def _json(path: Path) -> Any:
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    return json.loads(content)


def _paths(data: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the ways to all entries; of lists only to the first and last."""
    found = [path]
    if isinstance(data, dict):
        for key, value in data.items():
            found += _paths(value, (*path, key))
    elif isinstance(data, list) and data:
        for place in {0, len(data) - 1}:
            found += _paths(data[place], (*path, place))
    return found


def copied(source: Path, target: Path) -> Path:
    """Copy a checkpoint anew, with a file beside it that nothing in it may lead to."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target / "model")
    shutil.copyfile(next(source.glob("*.safetensors")), target / "canary.safetensors")
    return target / "model"


_guarded = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _guarded:
        return
    if event in ("pickle.find_class", "socket.connect", "subprocess.Popen", "os.system"):
        raise Escape(f"{event} {arguments}")
    if event == "open" and str(arguments[0]).endswith(("canary.safetensors", "etc/passwd")):
        raise Escape(f"{event} {arguments}")


sys.addaudithook(_audit)


@contextmanager
def guarded() -> Iterator[None]:
    """Let nothing be unpickled, fetched, executed or read outside; bound time and memory."""
    global _guarded

    def hangs(number: int, frame: FrameType | None) -> None:
        raise Escape(f"takes longer than {_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESS_SPACE, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    _guarded = True
    try:
        yield
    finally:
        _guarded = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
