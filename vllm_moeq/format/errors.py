"""The error that every reader of the format raises, and how it names many things."""

from collections.abc import Sequence

_SHOWN = 5


class FormatError(ValueError):
    """A plan, checkpoint or file does not follow the moeq format; the message names the part."""


def first_few(items: Sequence[str], separator: str = ", ") -> str:
    """Name the first five, and say how many there are beside them."""
    more = len(items) - _SHOWN
    return separator.join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
