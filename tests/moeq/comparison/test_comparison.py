"""``moeq compare`` through the real command; its figures against packed checkpoints."""

import errno
import json
import math
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moeq.comparison.study import correlations
from moeq.signals.table import SIGNALS
from support.cli import run_moeq, run_moeq_alone
from support.reference import dequantize_checkpoint

pytestmark = pytest.mark.slow

TEXT = "".join(f"Line {i} of a text whose bytes are tokens, {i * i % 97}.\n" for i in range(400))
LENGTH = 48


class Comparison:
    """What the command wrote."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.text = model, folder / "text.txt"
        self.text.write_text(TEXT[len(TEXT) // 2 :])
        self.calibration = folder / "calibration.txt"
        self.calibration.write_text(TEXT[: len(TEXT) // 2])
        done = run_moeq(
            "compare", model, "-o", folder / "out", "--bits", "2,2.5", "--methods", "rtn",
            "--calib", self.calibration, "--text", self.text, "--group-size", 32, "--random", 2,
            "--nsamples", 12, "--seqlen", LENGTH, "--eval-nsamples", 3,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.out, self.printed = folder / "out", done.stdout
        self.data: dict[str, Any] = json.loads((self.out / "compare.json").read_text())


@pytest.fixture(scope="module")
def comparison(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Comparison:
    return Comparison(tiny_model("mixtral"), tmp_path_factory.mktemp("compare"))


def test_plans_of_a_budget_take_the_same_bytes(comparison: Comparison) -> None:
    sizes: dict[float, list[int]] = {}
    for plan in comparison.data["plans"]:
        sizes.setdefault(plan["bits"], []).append(plan["total_bytes"])
    assert set(sizes) == {2, 2.5}
    for bits, found in sizes.items():
        assert len(found) == (4 if bits == 2 else 3 + 1 + len(SIGNALS) + 2)
        # A knapsack may leave a little of the budget.
        assert max(found) - min(found) < 0.01 * max(found)


@pytest.mark.parametrize("strategy", ["random:1", "global sensitivity"])
def test_figures_are_those_of_a_packed_checkpoint(
    strategy: str, comparison: Comparison, tmp_path: Path
) -> None:
    (point,) = (
        plan
        for plan in comparison.data["plans"]
        if (plan["strategy"], plan["bits"]) == (strategy, 2.5)
    )
    (tmp_path / "plan.json").write_text(json.dumps(point["plan"]))
    packed = tmp_path / "packed"
    done = run_moeq(
        "quantize", comparison.model, "-o", packed, "--plan", tmp_path / "plan.json", "--method=rtn"
    )
    assert done.returncode == 0, done.stderr
    done = run_moeq(
        "eval", packed, "--against", comparison.model, "--text", comparison.text, "--json",
        "--nsamples", 3, "--seqlen", LENGTH,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, value in point["total"].items():
        assert value == pytest.approx(found["total"][name], rel=1e-3, abs=1e-5), name
    assert point["routing_shift"] == pytest.approx(found["routing_shift"], abs=1e-3)


def test_page_shows_everything_and_needs_nothing_else(comparison: Comparison) -> None:
    page = (comparison.out / "compare.html").read_text()
    assert page.count("<svg") == 3
    # Names of XML vocabularies only; nothing is loaded.
    for address in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert address.startswith(("#", "data:"))
    table = page[page.index("<table>") :]
    for plan in comparison.data["plans"]:
        name = "random (2 plans)" if "random" in plan["strategy"] else plan["strategy"]
        assert f">{name}</td>" in table
    markdown = (comparison.out / "compare.md").read_text()
    assert "global sensitivity" in markdown and "global sensitivity" in comparison.printed
    for signal in SIGNALS:
        assert f"| {signal.name} | {signal.needs} |" in markdown


def test_errors_are_compared_at_the_width_below_each_average(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, text, heldout = tiny_model("mixtral"), tmp_path / "text.txt", tmp_path / "heldout.txt"
    text.write_text(TEXT)
    heldout.write_text(TEXT[::-1])
    done = run_moeq(
        "compare", model, "-o", tmp_path / "out", "--bits", "1,3.5", "--methods", "rtn", "--calib",
        text, "--text", heldout, "--group-size", 32, "--random", 2, "--nsamples", 12, "--seqlen",
        LENGTH, "--eval-nsamples", 3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = (
        plan["plan"]
        for plan in json.loads((tmp_path / "out" / "compare.json").read_text())["plans"]
        if (plan["strategy"], plan["bits"]) == ("weight-error", 3.5)
    )
    done = run_moeq(
        "quantize", model, "-o", tmp_path / "packed", "--bits", 3, "--strategy", "uniform",
        "--method", "rtn", "--group-size", 32,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "rounded")
    rounded, original = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "rounded", model)
    )
    for container, bits in found["expert_bits"].items():
        errors = [
            sum(
                float((rounded[name].double() - original[name].double()).square().sum())
                for name in original
                if name.startswith(f"{container}.{expert}.")
            )
            for expert in range(8)
        ]
        worst = sorted(range(8), key=lambda expert: -errors[expert])[:4]
        assert {expert for expert in range(8) if bits["w13"][expert] == 4} == set(worst)


def test_strategies_can_be_chosen(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "heldout.txt").write_text(TEXT[::-1])
    command = (
        "compare", tiny_model("mixtral"), "-o", tmp_path / "out", "--bits", "2,2.5", "--methods",
        "rtn", "--calib", tmp_path / "text.txt", "--text", tmp_path / "heldout.txt", "--random", 2,
        "--group-size", 32, "--nsamples", 12, "--seqlen", LENGTH, "--eval-nsamples", 3,
    )  # fmt: skip
    done = run_moeq(*command, "--strategies", "pmq,global sensitivity,the best")
    assert done.returncode == 1
    assert "--strategies: 'the best' is not one of" in done.stderr and "maxvar" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run_moeq(*command, "--strategies", "pmq,global sensitivity")
    assert done.returncode == 0, done.stderr
    plans = json.loads((tmp_path / "out" / "compare.json").read_text())["plans"]
    assert [(plan["bits"], plan["strategy"]) for plan in plans] == [
        (2, "global sensitivity"), (2, "uniform"), (2.5, "global sensitivity"), (2.5, "pmq"),
        (2.5, "random:0"), (2.5, "random:1"),
    ]  # fmt: skip


def test_the_page_draws_the_strategies_that_were_chosen(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "heldout.txt").write_text(TEXT[::-1])
    done = run_moeq(
        "compare", tiny_model("mixtral"), "-o", tmp_path / "out", "--bits", "2.5", "--methods",
        "rtn", "--calib", tmp_path / "text.txt", "--text", tmp_path / "heldout.txt", "--random", 2,
        "--group-size", 32, "--nsamples", 12, "--seqlen", LENGTH, "--eval-nsamples", 3,
        "--strategies", "data-free-error",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "compare.html").read_text()
    pareto, plans, _ = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert ">data-free-error<" in pareto and ">bits: data-free-error, 2.5 on average<" in plans
    for strategy in ("uniform", "combined", "maxvar", "pmq"):
        assert f">{strategy}<" not in pareto


def test_perplexity_is_that_of_the_loss(comparison: Comparison) -> None:
    for plan in comparison.data["plans"]:
        if plan["strategy"].startswith("random:"):
            continue
        perplexity = f"{math.exp(plan['total']['loss']):.3f}"
        (row,) = (
            line
            for line in comparison.printed.splitlines()
            if line.startswith(f"| rtn | {plan['bits']:g} | {plan['strategy']} |")
        )
        assert row.split("|")[-2].strip() == perplexity
        page = (comparison.out / "compare.html").read_text()
        assert f"<td>{perplexity}</td>" in page


def test_random_plans_are_one_row_with_a_spread(comparison: Comparison) -> None:
    found = [
        plan["total"]["divergence"]
        for plan in comparison.data["plans"]
        if plan["strategy"].startswith("random:")
    ]
    mean = sum(found) / 2
    spread = abs(found[0] - found[1]) / 2**0.5
    assert f"| {mean:.5f} ± {spread:.5f} | 100% |" in (comparison.out / "compare.md").read_text()


def test_correlation_of_ranks() -> None:
    signals = {signal.name: {"layer": [1.0, 2.0, 3.0, 4.0]} for signal in SIGNALS}
    signals["maxvar"] = {"layer": [40.0, 3.0, 2.0, 1.0]}  # opposite order
    signals["kurtosis"] = {"layer": [1.0, 1.0, 1.0, 1.0]}  # no order
    signals["frequency"] = {"layer": [1.0, 2.0, 4.0, 3.0]}  # 1 - 6 * 2 / (4 * 15)
    found = correlations(signals)
    assert found["sensitivity"] == pytest.approx(1)
    assert found["maxvar"] == pytest.approx(-1)
    assert found["kurtosis"] == 0
    assert found["frequency"] == pytest.approx(0.8)
    assert found["router-norm"] == pytest.approx(-1)  # small values get most bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "magic"), "--methods magic is not one of gptq, hqq, rtn"),
        (("--methods", "rtn,rtn"), "--methods names the same value twice"),
        (("--text", "CALIBRATION"), "--text must be another text than --calib"),
        (("--random", 1), "--random 1 must be at least 2"),
        (("--bits", "0.5,2"), "--bits must be between 1 and 8"),
        (("--eval-nsamples", 0), "--eval-nsamples 0 is not a positive number"),
        (("--group-size", 100), "--group-size 100 is not one of 32, 64, 128"),
    ],
)
def test_bad_options_are_named(
    options: tuple[object, ...], message: str, comparison: Comparison, tmp_path: Path
) -> None:
    options = tuple(comparison.calibration if o == "CALIBRATION" else o for o in options)
    done = run_moeq(
        "compare", comparison.model, "-o", tmp_path / "out", "--calib", comparison.calibration,
        "--text", comparison.text, "--nsamples", 1, "--seqlen", 16, "--group-size", 32, *options,
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_before_any_work(comparison: Comparison) -> None:
    done = run_moeq("compare", comparison.model, "-o", "/proc/out", "--text", "not-yet-read.txt")
    assert done.returncode == 1
    assert "cannot write /proc/out" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_exists_is_told_before_a_model_is_fetched(tmp_path: Path) -> None:
    done = run_moeq("compare", "no/such-model", "-o", tmp_path, "--text", "not-yet-read.txt")
    assert done.returncode == 1
    assert f"{tmp_path} exists already" in done.stderr


def test_temporary_files_that_cannot_be_written_are_named(
    comparison: Comparison, tmp_path: Path
) -> None:
    done = run_moeq_alone(
        "compare", comparison.model, "-o", tmp_path / "out", "--calib", comparison.calibration,
        "--text", comparison.text, "--nsamples", 1, "--seqlen", 16, "--group-size", 32,
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot measure in" in done.stderr and "Traceback" not in done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr
    assert list(tmp_path.iterdir()) == []
