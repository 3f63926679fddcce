"""Temporary files of a measurement: where they are, and whether there is space for them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from moeq.checkpoint.disk_errors import disk_errors
from moeq.errors import MoeqError


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a folder for the time of a measurement, where TMPDIR says.

    Raises:
        MoeqError: There is none, or its disk is full or fails.
    """
    with (
        disk_errors("cannot measure in a temporary folder (TMPDIR names another place)"),
        TemporaryDirectory(prefix="moeq-") as name,
    ):
        yield Path(name)


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
            "bytes free; make room, or give fewer `nsamples`; `moeq plan` and `moeq compare` take "
            "the folder that TMPDIR names"
        )
