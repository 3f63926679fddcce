"""The error of rounding on random inputs, against float64 arithmetic of our own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeq.checkpoint import Matrix, MoELayer, SourceModel
from moeq.errors import MoeqError
from moeq.model.layerwise import LayerwiseModel
from moeq.rounding import quantize_rtn
from moeq.signals.random_inputs import TOKENS, data_free_error
from support.checkpoints import CONTAINERS, Tensors, mixtral_tensors, write_checkpoint
from support.sources import load, rewrite

BITS, GROUP_SIZE = 3, 32
MATRICES: tuple[Matrix, ...] = ("gate", "up", "down")
NORM = "model.layers.0.post_attention_layernorm"


def _first_layer(folder: Path) -> tuple[LayerwiseModel, MoELayer]:
    source = SourceModel.open(folder)
    layers = source.layers
    return LayerwiseModel(source, torch.device("cpu")), layers[0]


def _rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(1, keepdim=True) + eps).sqrt()


Norm = Callable[[torch.Tensor, Tensors, float], torch.Tensor]
NORMS: dict[str, Norm] = {
    "olmoe": lambda x, norm, eps: _rms(x, eps) * norm["weight"],
    "qwen3_next": lambda x, norm, eps: _rms(x, eps) * (1 + norm["weight"]),
    "qwen3_5_moe_text": lambda x, norm, eps: _rms(x, eps) * (1 + norm["weight"]),
    "phimoe": lambda x, norm, eps: (
        _rms(x - x.mean(1, keepdim=True), eps) * norm["weight"] + norm["bias"]
    ),
    "flex_olmo": lambda x, norm, eps: x,  # a norm follows its experts, none is before them
}


def _swiglu(matrices: dict[Matrix, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    gate = x @ matrices["gate"].T
    return (gate / (1 + (-gate).exp()) * (x @ matrices["up"].T)) @ matrices["down"].T


def _expected(tensors: Tensors, layer: MoELayer, x: torch.Tensor) -> list[float]:
    """Return the mean squared change of outputs on x."""
    found = []
    for expert in range(layer.num_experts):
        matrices = {m: tensors[layer.tensor_name(expert, m)].double() for m in MATRICES}
        rounded = {
            name: quantize_rtn(matrix.float(), BITS, GROUP_SIZE)
            .dequantize(BITS, GROUP_SIZE)
            .double()
            for name, matrix in matrices.items()
        }
        found.append(float((_swiglu(rounded, x) - _swiglu(matrices, x)).square().mean()))
    return found


@pytest.mark.parametrize("family", NORMS)
def test_data_free_error(tiny_model: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    plain = tiny_model(family)
    tensors = load(plain)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.startswith(NORM):
            tensors[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        elif ".experts.1." in name:
            tensors[name] = 2 * tensor
    folder = rewrite(plain, tmp_path / "model", tensors)
    model, layer = _first_layer(folder)
    x = torch.randn(TOKENS, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    norm = {
        kind: tensors[f"{NORM}.{kind}"].double()
        for kind in ("weight", "bias")
        if f"{NORM}.{kind}" in tensors
    }
    eps = json.loads((folder / "config.json").read_text())["rms_norm_eps"]

    found = data_free_error(model, layer, BITS, GROUP_SIZE)

    expected = _expected(tensors, layer, NORMS[family](x.double(), norm, eps))
    assert found.tolist() == pytest.approx(expected, rel=1e-3)
    assert found.argmax() == 1


def test_weights_must_be_finite(tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    name = f"{CONTAINERS[0]}.1.w3.weight"
    tensors[name][0, 0] = torch.inf
    first = _first_layer(write_checkpoint(tmp_path, tensors))
    with pytest.raises(MoeqError, match=name):
        data_free_error(*first, BITS, GROUP_SIZE)
