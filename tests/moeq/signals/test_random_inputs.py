"""The error of rounding on random inputs, against float64 arithmetic of our own."""

from pathlib import Path

import pytest
import torch

from moeq.checkpoint import SourceModel
from moeq.checkpoint.families import MoELayer
from moeq.errors import MoeqError
from moeq.model.layerwise import LayerwiseModel
from moeq.rounding import quantize_rtn
from moeq.signals.random_inputs import TOKENS, data_free_error
from support.checkpoints import (
    CONTAINERS,
    HIDDEN,
    NUM_EXPERTS,
    Tensors,
    mixtral_tensors,
    write_checkpoint,
)

BITS, GROUP_SIZE = 3, 32
NORM = "model.layers.0.post_attention_layernorm.weight"


def _first_layer(folder: Path) -> tuple[LayerwiseModel, MoELayer]:
    source = SourceModel.open(folder)
    layers = source.layers
    return LayerwiseModel(source, torch.device("cpu")), layers[0]


def _swiglu(matrices: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    gate = x @ matrices["w1"].T
    return (gate / (1 + (-gate).exp()) * (x @ matrices["w3"].T)) @ matrices["w2"].T


def _expected(tensors: Tensors, scale: torch.Tensor) -> list[float]:
    """Return the mean squared change of outputs on the inputs that the product draws."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).double() * scale.double()
    found = []
    for expert in range(NUM_EXPERTS):
        matrices = {m: tensors[f"{CONTAINERS[0]}.{expert}.{m}.weight"] for m in ("w1", "w3", "w2")}
        rounded = {
            name: quantize_rtn(matrix, BITS, GROUP_SIZE).dequantize(BITS, GROUP_SIZE).double()
            for name, matrix in matrices.items()
        }
        original = {name: matrix.double() for name, matrix in matrices.items()}
        found.append(float((_swiglu(rounded, x) - _swiglu(original, x)).square().mean()))
    return found


@pytest.mark.parametrize("with_norm", [False, True])
def test_data_free_error(with_norm: bool, tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    scale = torch.ones(HIDDEN)
    if with_norm:
        scale = torch.linspace(0.1, 3, HIDDEN)
        tensors[NORM] = scale
    for name in tensors:
        if f"{CONTAINERS[0]}.1." in name:
            tensors[name] = 2 * tensors[name]
    found = data_free_error(*_first_layer(write_checkpoint(tmp_path, tensors)), BITS, GROUP_SIZE)
    assert found.shape == (NUM_EXPERTS,)
    assert found.tolist() == pytest.approx(_expected(tensors, scale), rel=1e-3)
    assert found.argmax() == 1


def test_weights_must_be_finite(tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    name = f"{CONTAINERS[0]}.1.w3.weight"
    tensors[name][0, 0] = torch.inf
    first = _first_layer(write_checkpoint(tmp_path, tensors))
    with pytest.raises(MoeqError, match=name):
        data_free_error(*first, BITS, GROUP_SIZE)
