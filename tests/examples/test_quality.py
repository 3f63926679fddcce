"""The benchmark of quality: its figures are those of ``moeq eval``."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.cli import ROOT, environment, run_moeq

BENCHMARK = ROOT / "examples" / "benchmarks" / "quality.py"
TEXT = "".join(f"Line {i} of a text whose bytes are tokens, {i * i % 97}.\n" for i in range(300))


@pytest.mark.slow
def test_figures_are_those_of_packed_checkpoints(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, text, heldout = tiny_model("mixtral"), tmp_path / "text.txt", tmp_path / "heldout.txt"
    text.write_text(TEXT)
    heldout.write_text(TEXT[::-1])
    calibration = ("--nsamples", 8, "--seqlen", 32)
    command = [
        sys.executable, BENCHMARK, model, "--calib", text, "--text", heldout, *calibration,
        "--bits", 2, 2.5, "--methods", "gptq", "--strategies", "uniform", "random", "--draws", 2,
        "--group-size", 64, "--eval-nsamples", 3, "--results", tmp_path / "RESULTS.md",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    table = [
        line.split("|")[1:-1]
        for line in (tmp_path / "RESULTS.md").read_text().splitlines()
        if "gptq |" in line
    ]
    assert [row[0].strip() for row in table] == ["2, uniform, gptq", "2.5, random, gptq"]

    losses, divergences = [], []
    for draw in range(2):
        packed = tmp_path / f"packed-{draw}"
        made = run_moeq(
            "quantize", model, "-o", packed, "--bits", 2.5, "--strategy", f"random:{draw}",
            "--group-size", 64, "--calib", text, *calibration, "--seed", draw,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        judged = run_moeq(
            "eval", packed, "--against", model, "--text", heldout, "--json", "--nsamples", 3,
            "--seqlen", 32,
        )  # fmt: skip
        total = json.loads(judged.stdout)["total"]
        losses.append(total["loss"] - total["original_loss"])
        divergences.append(total["divergence"])
    for cell, values, accuracy in ((table[1][2], losses, 1e-4), (table[1][3], divergences, 1e-5)):
        mean, deviation = map(float, cell.split("±"))
        assert mean == pytest.approx(sum(values) / 2, abs=accuracy)
        assert deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=accuracy)
