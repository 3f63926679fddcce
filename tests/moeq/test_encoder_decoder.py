"""A Switch Transformer through every step, on pairs of source and target."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import moeq
from moeq.errors import MoeqError
from support.models import load_model
from support.reference import dequantize_checkpoint
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
PAIRS, LENGTH, SOURCE = 40, 48, 36
START = 2
SIZES: dict[str, Any] = {"nsamples": 24, "seqlen": LENGTH}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of pairs, some of which are filled and others cut."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for _ in range(PAIRS):
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


@torch.no_grad()
def _scores(source: Path, packed: Path, pairs: Path, plain: Path) -> tuple[float, float]:
    """Return loss and divergence of a packed model by transformers, a pair at a time, unfilled."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    models = [load_model(path).eval() for path in (source, dequantize_checkpoint(packed, plain))]
    losses, divergences = [], []
    for line in pairs.read_text().splitlines():
        row = json.loads(line)
        asked, target = (tokenizer(row[name])["input_ids"] for name in ("source", "target"))
        asked = torch.tensor([asked[:SOURCE]])
        target = torch.tensor([[START, *target][: LENGTH - SOURCE]])
        p, q = (
            model(input_ids=asked, decoder_input_ids=target).logits[0, :-1].double().log_softmax(-1)
            for model in models
        )
        losses.append(-q.gather(-1, target[0, 1:, None]))
        divergences.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(losses).mean().item(), torch.cat(divergences).mean().item()


@pytest.mark.parametrize("family", [TINY])  # for the table of families
def test_scores_are_those_of_transformers(
    family: str, model: Path, tiny_model: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    source, options = tiny_model(family), SIZES | {"nsamples": PAIRS}
    scores = [
        moeq.evaluate(model, against=source, text=str(pairs), backend=backend, **options)
        for backend in ("reference", "transformers")
    ]
    loss, divergence = _scores(source, model, pairs, tmp_path / "plain")
    assert divergence > 0
    for score in scores:
        assert score.total.loss == pytest.approx(loss, rel=1e-5)
        assert score.total.divergence == pytest.approx(divergence, rel=1e-3)
    assert scores[0].total.tokens == scores[1].total.tokens
    assert scores[0].routing_shift == pytest.approx(scores[1].routing_shift)
    with pytest.raises(MoeqError, match="vLLM has no switch_transformers; use reference or tran"):
        moeq.evaluate(model, against=source, text=str(pairs), backend="vllm", **options)


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
