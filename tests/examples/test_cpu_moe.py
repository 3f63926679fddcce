"""The judgement of the CPU kernel's benchmark, which decides what RESULTS.md claims."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def target() -> type:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from cpu_moe import Target
    finally:
        sys.path.remove(str(BENCHMARKS))
    return Target


@pytest.mark.parametrize(
    ("at_most", "figures", "verdict"),
    [
        (False, {"a": 2.0, "b": 2.5}, "- **met**: speed: 2.00 to 2.50."),
        (False, {"a": 1.99, "b": 2.5}, "- **MISSED** in 1 of 2 cases: speed: 1.99 to 2.50; the "
         "worst is a."),
        (True, {"a": 2.0, "b": 1.0}, "- **met**: speed: 1.00 to 2.00."),
        (True, {"a": 1.0, "b": 2.01}, "- **MISSED** in 1 of 2 cases: speed: 1.00 to 2.01; the "
         "worst is b."),
        (False, {}, "- not measured: speed."),
    ],
)  # fmt: skip
def test_verdict(target: type, at_most: bool, figures: dict[str, float], verdict: str) -> None:
    assert target("speed", 2.0, figures, at_most).verdict() == verdict
