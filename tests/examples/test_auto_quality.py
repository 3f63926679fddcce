"""The experiment on what auto takes: a real run, whose table follows from what it printed."""

import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmarks" / "auto_quality.py"
TEXT = "".join(f"Line {i} of a text whose bytes are tokens, {i * i % 97}.\n" for i in range(400))


def test_the_table_holds_the_means_of_what_was_judged(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("calibration", "heldout"):
        (tmp_path / f"{name}.txt").write_text(TEXT[: 6000 if name == "heldout" else None])
    done = subprocess.run(
        [
            sys.executable, BENCHMARK, tiny_model("mixtral"), "--calib",
            tmp_path / "calibration.txt", "--text", tmp_path / "heldout.txt", "--bits", "2.5",
            "--seeds=1", "--nsamples=12", "--seqlen=32", "--group-size=32", "--max-tokens=600",
            "--results", tmp_path / "RESULTS.md",
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed: dict[str, list[tuple[float, float]]] = defaultdict(list)
    pattern = r"== 2.5 bits, draw 0, ([\w:-]+): Judgement\(increase=(\S+), divergence=(\S+)\)"
    for name, increase, divergence in re.findall(pattern, done.stdout):
        printed[name.split(":")[0]].append((float(increase), float(divergence)))
    assert len(printed["random"]) == 3
    assert {"sensitivity", "combined", "maxvar", "pmq", "random"} == set(printed)

    section = (tmp_path / "RESULTS.md").read_text()
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")][2:]
    table = {row[0].split(" (")[0].strip(): [cell.split()[0] for cell in row[1:]] for row in rows}
    usual = statistics.mean(divergence for _, divergence in printed["random"])
    taken = re.search(r"auto took ([\w:-]+);", section)
    assert taken is not None
    assert table["auto"] == table.get(taken[1], table["auto"])  # a random plan has no row alone
    for name, judged in printed.items():
        increase, divergence = map(statistics.mean, zip(*judged, strict=True))
        assert float(table[name][1]) == pytest.approx(divergence, abs=1e-5)
        assert float(table[name][0]) == pytest.approx(increase, abs=1e-4)
        assert table[name][2] == f"{divergence / usual:.0%}"
