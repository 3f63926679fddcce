"""The experiment with a fine-tuned model: real training, real plans, a real section."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.cli import run_moeq

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def _plan(model: Path, base: Path) -> dict[str, Any]:
    done = run_moeq(
        "plan", model, "--bits=2.5", "--group-size=32", "--strategy=router-norm", "--base-router",
        base, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    assert plan["provenance"]["details"]["router_signal"] == "norm change"
    return plan


def test_what_the_tracker_records_is_the_change_since_the_pretrained_checkpoint(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from fine_tuning import FREQUENT, RARE, fine_tune

    source, output = tiny_model("mixtral"), tmp_path / "out"
    sequences = torch.randint(3, 259, (8, 128), generator=torch.Generator().manual_seed(0))
    fine_tune(source, output, {FREQUENT: sequences[:4], RARE: sequences[4:]}, 0.5, steps=30)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, output / "model")
    )
    orders = []
    for layer in range(2):
        norms = [weights[ROUTER.format(layer)].double().norm(dim=1) for weights in (before, after)]
        change = norms[1] - norms[0]
        assert change.abs().max() > 1e-4  # it learned
        orders.append(change.argsort()[:4].sort().values.tolist())
    plans = [_plan(output / "model", base) for base in (output / "routers.safetensors", source)]
    assert plans[0]["expert_bits"] == plans[1]["expert_bits"]
    for bits, order in zip(plans[0]["expert_bits"].values(), orders, strict=True):
        widths = bits["w13"] if isinstance(bits, dict) else bits
        assert [expert for expert, width in enumerate(widths) if width == 3] == order


def test_every_strategy_is_judged_on_both_texts(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, words in (("often", "some words again "), ("seldom", "another way to say it ")):
        (tmp_path / f"{name}.txt").write_text(words * 1500)
    done = subprocess.run(
        [
            sys.executable, BENCHMARKS / "fine_tuning.py", tiny_model("mixtral"),
            "--frequent", tmp_path / "often.txt", "--rare", tmp_path / "seldom.txt",
            "--steps=2", "--nsamples=10", "--eval-nsamples=2", "--random=2", "--share=0.2",
            "--group-size=32", "--results", tmp_path / "RESULTS.md",
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    section = (tmp_path / "RESULTS.md").read_text()
    assert "judged on 256 frequent and 256 rare tokens" in section
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")][1:]
    names = {row[0].strip() for row in rows}
    assert {"combined", "router-norm", "router-norm reversed", "global sensitivity"} < names
    assert "random (2 plans)" in names
    for row in rows[1:]:
        assert len(row) == 7 and all(cell.strip() for cell in row)
