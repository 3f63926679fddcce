"""A rotated checkpoint is the same function: against transformers, in float64."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralForCausalLM

from moeq.checkpoint.reader import CheckpointReader
from moeq.errors import MoeqError

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
TOKENS = torch.arange(3, 67).view(2, 32)


@pytest.fixture(scope="module")
def rotation() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import rotation
    finally:
        sys.path.remove(str(BENCHMARKS))
    return rotation


@torch.inference_mode()
def _logits(folder: Path) -> torch.Tensor:
    model = MixtralForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    return model(TOKENS).logits


def _with_uneven_norms(folder: Path, output: Path) -> Path:
    """Copy a model and give every norm random weights, so that a forgotten one is noticed."""
    model = MixtralForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand(parameter.shape, generator=generator).double() + 0.5
    model.save_pretrained(output)
    return output


def test_rotated_model_is_the_same_function(
    rotation: ModuleType, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = _with_uneven_norms(tiny_model("mixtral"), tmp_path / "model")
    rotation.write_rotated(folder, tmp_path / "rotated", seed=0)
    before, after = _logits(folder), _logits(tmp_path / "rotated")
    # transformers computes norms and the router's softmax in float32 even then.
    assert (after - before).abs().max() < 2e-6 * before.abs().max()
    old, new = CheckpointReader(folder), load_file(tmp_path / "rotated" / "model.safetensors")
    assert new.keys() == old.tensors.keys()
    for name, tensor in new.items():
        assert not torch.equal(tensor, old.tensor(name)), name


@pytest.mark.parametrize("size", [1, 2, 64])
def test_rotation_is_orthogonal_and_spreads_every_channel_evenly(
    rotation: ModuleType, size: int
) -> None:
    matrix = rotation.hadamard_rotation(size, seed=1)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size).double(), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_what_cannot_be_rotated_is_refused(
    rotation: ModuleType, tiny_model: Callable[[str], Path]
) -> None:
    with pytest.raises(MoeqError, match="power of 2, not 96"):
        rotation.hadamard_rotation(96, seed=0)
    reader = CheckpointReader(tiny_model("mixtral"))
    tensors = {name: reader.tensor(name) for name in reader.tensors}
    matrix = rotation.hadamard_rotation(128, seed=0)
    with pytest.raises(MoeqError, match="k_norm.weight is no tensor of a Mixtral"):
        rotation.rotated({**tensors, "model.layers.0.self_attn.k_norm.weight": matrix}, matrix)
    del tensors["lm_head.weight"]
    with pytest.raises(MoeqError, match="tied embeddings"):
        rotation.rotated(tensors, matrix)
