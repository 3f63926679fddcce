"""How far long work has come, reported to whoever called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Is called when a stage starts, after each of its steps, and so at its end.

    It is always called by the thread that started the work. An exception in it ends the work as
    Ctrl-C would.
    """

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        """Report a step.

        Args:
            stage: What is being done, in a word or two.
            done: Units that are finished, from 0 to ``total``.
            total: Units of the whole stage.
            unit: ``expert``, ``layer`` or ``B`` (bytes).
        """


def silent(stage: str, done: int, total: int, unit: str) -> None:
    """Say nothing."""


@contextmanager
def stage(progress: Progress, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Report a stage; give what is to be called with the units of each step."""
    done = 0
    progress(name, done, total, unit)

    def advance(units: int) -> None:
        nonlocal done
        done += units
        progress(name, done, total, unit)

    yield advance
