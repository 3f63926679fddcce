"""The cost of calibration: a small run that is killed, and what its section says.

It is killed before it can have finished anything: what a kill amid layers changes is for
``tests/moeq/test_calibration.py``.
"""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmarks" / "calibration_cost.py"


@pytest.mark.slow
def test_unused_experts_and_kills(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, BENCHMARK, "--layers=3", "--experts=4", "--used=2", "--hidden-size=256",
            "--intermediate-size=128", "--nsamples=2", "--seqlen=64", "--compare-layers=1",
            "--kill-after=0.5", "--work", tmp_path, "--results", tmp_path / "RESULTS.md",
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    section = (tmp_path / "RESULTS.md").read_text()
    assert "| experts rounded without calibration | 6 |" in section
    # Three matrices, each with codes, scales and zero points.
    assert "| tensors of the first 1 layers equal without a kill | 36 of 36 |" in section
    assert {path.name for path in tmp_path.iterdir()} == {"RESULTS.md"}
