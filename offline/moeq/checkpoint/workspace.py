"""Folders and files that survive a kill and are never half-written or shared by two runs."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moeq.checkpoint.reader import CheckpointReader
from moeq.errors import MoeqError
from vllm_moeq._version import __version__


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Create a folder if need be, and keep other runs out of it.

    The lock on the folder itself is freed by the system when the process dies, so a later run can
    tell the remains of a killed run from the work of a living one.

    Raises:
        MoeqError: Another run has it; the message is ``busy``. Or it cannot be created.
    """
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise MoeqError(f"cannot write {folder}: {error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MoeqError(busy) from None
        # The other run may have ended, and renamed this very folder, before we got the lock.
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise MoeqError(busy)
        yield
    finally:
        os.close(descriptor)


def clear(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def begin(path: Path, fingerprint: dict[str, Any]) -> None:
    """Note what work a folder is for, or check that it was begun for the same.

    Args:
        path: File of the note.
        fingerprint: Everything that the result depends on, by a name for users, as JSON.

    Raises:
        MoeqError: It was begun for something else; names what differs.
    """
    fingerprint = json.loads(json.dumps(fingerprint))
    if path.exists():
        old = json.loads(path.read_text())
        changed = [name for name in fingerprint if fingerprint[name] != old.get(name)]
        if changed:
            raise MoeqError(
                f"cannot resume: the unfinished run had another {', another '.join(changed)}; "
                "use the same options, or leave out --resume to start again"
            )
    replace_file(path, lambda target: target.write_text(json.dumps(fingerprint)))


def work_on(reader: CheckpointReader, tokens: torch.Tensor, device: str) -> dict[str, Any]:
    """Return what a fingerprint says about a model, a calibration text and a place."""
    return {
        "moeq version": __version__,
        "source": reader.file_stats(),
        "config.json": reader.config,
        "calibration text": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "device": device,
    }


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is either complete or not there.

    Args:
        path: The file.
        write: Takes the path to write to.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    write(unfinished)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def used_bytes(folder: Path) -> int:
    """Return the bytes that a folder takes on disk; 0 if it is not there."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*"))


def check_space(needed: int, folder: Path) -> None:
    """Check that a measurement has space in its folder; what is there already counts as free.

    Raises:
        MoeqError: It has not; says how much it takes.
    """
    needed -= used_bytes(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MoeqError(
            f"measuring takes {needed:,} bytes of temporary files, {folder.parent} has {free:,} "
            "bytes free; make room, or give fewer --nsamples; `moeq plan` and `moeq compare` take "
            "the folder that TMPDIR names"
        )
