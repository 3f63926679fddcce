"""What has failed when a disk is full or fails, and what to do."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moeq.errors import MoeqError

_REMEDIES = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room there",
    errno.EIO: "The disk has failed: check it",
}
_OS_ERROR = re.compile(r"\b(?:code: |os error )(\d+)")
"""Matches what safetensors says of an error of the system."""


@contextmanager
def disk_errors(failure: str, then: str = "run the command again") -> Iterator[None]:
    """Say what has failed when a disk is full or fails, and what to do.

    Args:
        failure: The first words of the message.
        then: What to do when the disk is in order.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = _REMEDIES.get(_errno(error) or 0, "Mend that")
        raise MoeqError(f"{failure}: {error}. {remedy}, then {then}") from error


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Name the file in errors of the system that do not: only those of opening it do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _errno(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = _OS_ERROR.search(str(error))
    return int(match[1]) if match else None
