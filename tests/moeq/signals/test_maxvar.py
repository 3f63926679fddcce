"""MaxVar against float64 numpy, in the paper's definition and in that of its published code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moeq.checkpoint import SourceModel
from moeq.errors import MoeqError
from moeq.signals import max_var
from support.checkpoints import CONTAINERS, NUM_EXPERTS, Tensors, mixtral_tensors, write_checkpoint


def _max_row(weight: np.ndarray) -> float:
    return float(np.max(np.mean((weight - weight.mean(1, keepdims=True)) ** 2, axis=1)))


def _highest_norm_row(weight: np.ndarray) -> float:
    row = weight[np.argmax((weight**2).sum(1))]
    return float(((row - row.mean()) ** 2).sum() / (len(row) - 1))


REFERENCES = {"max-row": _max_row, "highest-norm-row": _highest_norm_row}


@pytest.fixture
def tensors() -> Tensors:
    """Weights in which the row with the highest norm is not the one with the most variance."""
    tensors = mixtral_tensors(seed=3)
    for name, weight in tensors.items():
        if name.endswith("w1.weight"):
            weight[5] += 10
            weight[6] *= 2
    return tensors


def _measure(folder: Path, tensors: Tensors, layer: int, variant: str) -> torch.Tensor:
    source = SourceModel.open(write_checkpoint(folder, tensors))
    return max_var(source, source.layers[layer], variant)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("variant", REFERENCES)
@pytest.mark.parametrize("at_once", [1, 200, 1 << 22])
def test_values_are_those_of_the_definition(
    tmp_path: Path,
    tensors: Tensors,
    layer: int,
    variant: str,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moeq.signals.maxvar._WEIGHTS_AT_ONCE", at_once)
    expected = [
        REFERENCES[variant](tensors[f"{CONTAINERS[layer]}.{expert}.w1.weight"].double().numpy())
        for expert in range(NUM_EXPERTS)
    ]
    np.testing.assert_allclose(_measure(tmp_path, tensors, layer, variant), expected, rtol=1e-5)


def test_max_row_is_the_default(tmp_path: Path, tensors: Tensors) -> None:
    source = SourceModel.open(write_checkpoint(tmp_path, tensors))
    layer = source.layers[0]
    assert torch.equal(max_var(source, layer), max_var(source, layer, "max-row"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("variant", REFERENCES)
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, tensors: Tensors, variant: str, bad: float
) -> None:
    name = f"{CONTAINERS[1]}.2.w1.weight"
    tensors[name][7, 3] = bad
    with pytest.raises(MoeqError, match=name):
        _measure(tmp_path, tensors, 1, variant)
