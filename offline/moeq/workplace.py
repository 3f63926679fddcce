"""Folders and files that survive a kill and are never half-written or shared by two runs."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeq.errors import MoeqError


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Create a folder if need be, and keep other runs out of it.

    The lock on the folder itself is freed by the system when the process dies, so a later run can
    tell the remains of a killed run from the work of a living one.

    Raises:
        MoeqError: Another run has it; the message is ``busy``.
    """
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
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
