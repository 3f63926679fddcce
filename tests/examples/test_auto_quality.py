"""The experiment on what auto takes: a real run, whose table follows from what it printed."""

import math
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


@pytest.mark.parametrize(
    ("tokens", "auto", "verdict"),
    [
        (1_000_000, 0.003, "is 30% of that of the mean random plan, which meets the goal of 40%."),
        (1_000_000, 0.005, "is 50% of that of the mean random plan, which MISSES the goal of 40%."),
        # The standard error of the tokens alone: sqrt(2 * 0.02 / 1000) = 0.0063.
        (1_000, 0.003, "Random plans raise the loss by 0.0100 ± 0.0065 (standard error, over plans "
         "and tokens), not beyond noise, and auto by 0.0030: that cannot tell whether auto meets "
         "the goal of 40%."),
    ],
)  # fmt: skip
def test_verdict(tokens: int, auto: float, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    from auto_quality import verdict as judged
    from held_out import Judgement

    # Over plans: 0.002 / sqrt(2) = 0.0014.
    away = 0.002 / math.sqrt(2)
    found = {
        "auto": [[Judgement(auto, 0.01)]],
        "random": [[Judgement(0.01 - away, 0.02), Judgement(0.01 + away, 0.02)]],
    }
    assert judged(2.5, found, ["sensitivity"], tokens).endswith(verdict)
