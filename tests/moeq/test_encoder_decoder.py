"""A Switch Transformer through every step, on pairs of source and target."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moeq
from moeq.errors import MoeqError
from support.sources import load

TINY = "switch_transformers"
WORDS = [
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "then",
    "some",
    "more",
]
SIZES: dict[str, Any] = {"nsamples": 24, "seqlen": 48}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of pairs, some of which are filled and others cut."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for _ in range(40):
        words = generator.choices(WORDS, k=generator.randint(4, 14))
        rows.append(json.dumps({"source": " ".join(words), "target": " ".join(words[:2])}))
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def model(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, pairs: Path
) -> Path:
    output = tmp_path_factory.mktemp("switch") / "gptq"
    options: dict[str, Any] = {"bits": 2, "strategy": "uniform", "group_size": 32}
    return moeq.quantize(
        tiny_model(TINY), output, calib=str(pairs), **options, **SIZES
    ).path  # fmt: skip


def test_both_backends_judge_alike(
    model: Path, tiny_model: Callable[[str], Path], pairs: Path
) -> None:
    scores = [
        moeq.evaluate(model, against=tiny_model(TINY), text=str(pairs), backend=backend, **SIZES)
        for backend in ("reference", "transformers")
    ]
    layerwise, whole = (score.total for score in scores)
    assert layerwise.tokens == whole.tokens
    assert layerwise.divergence == pytest.approx(whole.divergence, rel=1e-3) and whole.divergence
    assert layerwise.loss == pytest.approx(whole.loss, rel=1e-5)
    assert scores[0].routing_shift == pytest.approx(scores[1].routing_shift)
    with pytest.raises(MoeqError, match="vLLM has no switch_transformers; use reference or tran"):
        moeq.evaluate(model, against=tiny_model(TINY), text=str(pairs), backend="vllm", **SIZES)


def test_calibration_makes_it_better(
    model: Path, tiny_model: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"bits": 2, "strategy": "uniform", "group_size": 32, "calib": "none"}
    nearest = moeq.quantize(tiny_model(TINY), tmp_path / "rtn", method="rtn", **options).path
    calibrated, rounded = (
        moeq.evaluate(folder, against=tiny_model(TINY), text=str(pairs), **SIZES).total.divergence
        for folder in (model, nearest)
    )
    assert calibrated < 0.8 * rounded
    assert moeq.verify(model) == []


def test_a_run_that_ended_early_goes_on_and_gives_the_same_bytes(
    model: Path, tiny_model: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    """In the decoder, which looks at what the encoder gave."""
    options: dict[str, Any] = {
        "bits": 2,
        "strategy": "uniform",
        "group_size": 32,
        "calib": str(pairs),
        **SIZES,
    }

    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int, unit: str) -> None:
        if stage == "round" and done == 18:  # two layers have 8 experts each
            raise Killed

    with pytest.raises(Killed):
        moeq.quantize(tiny_model(TINY), tmp_path / "out", progress=kill, **options)
    again = moeq.quantize(tiny_model(TINY), tmp_path / "out", resume=True, **options).path

    found, expected = load(again), load(model)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)


def test_measured_plans_are_compared(
    tiny_model: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(" ".join(WORDS * 8))
    findings = moeq.compare(
        tiny_model(TINY), tmp_path / "page", calib=str(pairs), text=str(held_out), bits=[2.5],
        random=2, strategies=["global sensitivity", "combined", "router-norm reversed"],
        nsamples=8, seqlen=48,
    )  # fmt: skip
    assert [point.strategy for point in findings.points] == [
        "global sensitivity", "combined", "router-norm reversed", "random:0", "random:1"
    ]  # fmt: skip
    assert all(point.evaluation.total.divergence > 0 for point in findings.points)
    assert "decoder.block.1.layer.2.mlp.experts" in findings.signals["sensitivity"]
