"""How progress is shown: bars in a terminal, a line a minute elsewhere."""

import io
import signal
from contextlib import suppress

import pytest

from moeq.cli import progress
from moeq.cli.progress import Bars
from moeq.progress import stage


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_there_is_a_line_a_minute_with_the_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    with Bars(stream) as bars, stage(bars, "round", 100, "expert") as advance:
        for _ in range(50):
            clock.now += 6
            advance(1)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5  # of 300 seconds
    assert lines[0] == "round: 10%, 9 minutes left"
    assert lines[-1] == "round: 50%, 5 minutes left"


def test_short_work_says_nothing_without_a_terminal(clock: Clock) -> None:
    stream = io.StringIO()
    with Bars(stream) as bars, stage(bars, "write", 10, "B") as advance:
        clock.now += 59
        advance(10)
    assert stream.getvalue() == ""


def test_a_terminal_has_a_bar_for_each_stage() -> None:
    stream = Terminal()
    with Bars(stream) as bars:
        for name in ("gradients", "round"):
            with stage(bars, name, 2, "layer") as advance:
                advance(1)
                advance(1)
    shown = stream.getvalue()
    assert "gradients: 100%" in shown and "round: 100%" in shown and "2/2" in shown


def test_a_ctrl_c_that_a_library_swallowed_ends_the_work_at_the_next_step() -> None:
    steps = []
    with (
        pytest.raises(KeyboardInterrupt),
        Bars(io.StringIO()) as bars,
        stage(bars, "round", 3, "expert") as advance,
    ):
        advance(1)
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        steps.append("swallowed")
        advance(1)
        steps.append("went on")
    assert steps == ["swallowed"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_ctrl_c_that_a_library_turned_into_another_error_stays_one() -> None:
    with pytest.raises(KeyboardInterrupt), Bars(io.StringIO()):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("shapes do not fit") from None


def test_a_ctrl_c_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Bars(io.StringIO()) as bars:
            signal.raise_signal(signal.SIGINT)
            bars("round", 0, 1, "expert")
    finally:
        signal.signal(signal.SIGINT, before)
