"""Shows how far work has come: bars in a terminal, a line a minute elsewhere."""

import signal
import sys
import time
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

from tqdm import tqdm

from moeq.units import duration

_SECONDS = 60
"""Between two lines, where there is no terminal."""


class Bars:
    """A :class:`moeq.progress.Progress` that writes to a stream, the standard error by default.

    Native code that calls back into Python swallows Ctrl-C at times, or turns it into an error of
    its own. Work within this context ends all the same, at its next step.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._bar: tqdm | None = None
        self._stage = ""
        self._started = self._said = 0.0
        self._interrupted = self._listens = False

    def __enter__(self) -> "Bars":
        # Elsewhere it is ignored, as in the background of a script, or not ours to hear.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
            self._listens = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._bar is not None:
            self._bar.close()
        if self._interrupted and kind is not None and not issubclass(kind, KeyboardInterrupt):
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> NoReturn:
        self._interrupted = True
        raise KeyboardInterrupt

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        """Report a step, see :class:`moeq.progress.Progress`."""
        if self._interrupted:
            raise KeyboardInterrupt
        if self._terminal:
            self._draw(stage, done, total, unit)
        else:
            self._say(stage, done, total)

    def _draw(self, stage: str, done: int, total: int, unit: str) -> None:
        if done == 0 or self._bar is None:
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(
                total=total, desc=stage, unit=unit, unit_scale=unit == "B", file=self._stream
            )
        self._bar.update(done - self._bar.n)

    def _say(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0:
            self._stage, self._started, self._said = stage, now, now
        elif now - self._said >= _SECONDS:
            self._said = now
            left = (now - self._started) * (total - done) / done
            print(f"{stage}: {done / total:.0%}, {duration(left)} left", file=self._stream)
