"""Sizes, times and names as people write and read them."""

import math
import re
from fractions import Fraction
from pathlib import Path

from moeq.errors import MoeqError

_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


def parse_size(size: str | float, parameter: str) -> int:
    """Return the bytes that a size such as 14GB (1e9 bytes) or 13.5GiB (2**30 bytes) means.

    Args:
        size: The size; a number means bytes.
        parameter: Whose size it is, for errors.

    Raises:
        MoeqError: No size, none above zero, or one without a unit.
    """
    if isinstance(size, int | float) and math.isfinite(size) and size == int(size):
        size = f"{int(size)}B"
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]+)", str(size).lower())
    if not match or match[2] not in units or not Fraction(match[1]):
        raise MoeqError(
            f"`{parameter}` {size} is no size with a unit ({', '.join(_UNITS)}), such as 14GB or "
            "13.5GiB"
        )
    return math.floor(Fraction(match[1]) * units[match[2]])


def duration(seconds: float) -> str:
    """Return a time in words, coarsely: it is an estimate."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}s"
    if seconds >= 50:
        return "a minute"
    return "1 second" if seconds < 1.5 else f"{seconds:.0f} seconds"


def counted(count: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def public_name(source: str) -> str:
    """Return what others may know of a model or text: a hub id as it is, of a path its last part.

    A path of this machine is nobody's business who downloads a result.
    """
    path = Path(source)
    return path.resolve().name if path.exists() else source
