"""What rounding an expert costs: the command, with a small expert on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "benchmarks" / "gpu_calibration.py"


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "offline")))
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--tokens", "512", *options],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip


def test_seconds_and_errors_of_each_width(tmp_path: Path) -> None:
    results = tmp_path / "results.md"
    done = _run("--shape", "256,384,8,2", "--results", str(results), "--bits", "2", "4")
    assert done.returncode == 0, done.stderr
    text = results.read_text()
    rows = re.findall(r"^\| ([24]) \|" + r" ([\d.]+) \|" * 6 + "$", text, re.M)
    assert [row[0] for row in rows] == ["2", "4"]
    for _, total, w13, w2, cpu_seconds, *errors in rows:
        assert 0 <= float(cpu_seconds) < 60  # to a tenth: a fast machine needs less
        assert abs(float(total) - float(w13) - float(w2)) < 0.11
        assert all(0.02 < float(error) < 0.9 for error in errors)  # better than to the nearest
    assert "intermediate size 384, 512 tokens" in text
    assert "Peak memory" not in text


def test_no_width_starts_late_and_wrong_shapes_are_refused(tmp_path: Path) -> None:
    results = tmp_path / "results.md"
    done = _run("--shape", "256,384,8,2", "--results", str(results), "--seconds", "0")
    assert (done.returncode, results.exists()) == (0, False)
    done = _run("--shape", "256,384", "--results", str(results))
    assert done.returncode == 2 and "256,384" in done.stderr
