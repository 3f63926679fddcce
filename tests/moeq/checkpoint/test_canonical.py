"""Every layout of a model is read, and packed, as the same tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeq.checkpoint import SourceModel
from moeq.checkpoint.verify import verify_checkpoint
from moeq.errors import MoeqError
from support import models
from support.checkpoints import CONTAINERS, INTERMEDIATE, mixtral_tensors, write_checkpoint
from support.packed import write_packed
from support.sources import load, rewrite
from vllm_moeq.format import BitPlan, LayerBits

TinyModel = Callable[[str], Path]
every_family = pytest.mark.parametrize("name", models.FAMILIES)
FUSED_UP = f"{CONTAINERS[0]}.gate_up_proj"


def _both(source: Path, folder: Path) -> tuple[Path, Path]:
    """Save a model with a tensor per expert, and as transformers has it in memory."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(folder / "split")
    model.save_pretrained(folder / "fused", save_original_format=False)
    return folder / "split", folder / "fused"


def _plan(source: Path) -> BitPlan:
    bits = {
        layer.container: LayerBits((3, 2, 1, 4, 8, 2, 2, 3), (2, 4, 8, 1, 2, 3, 3, 4))
        for layer in SourceModel.open(source).layers
    }
    return BitPlan(32, bits)


@every_family
def test_a_fused_checkpoint_reads_as_the_one_with_a_tensor_per_expert(
    tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    split, fused = _both(tiny_model(name), tmp_path)
    expected, reader = load(split), SourceModel.open(fused).reader
    assert any(tensor.ndim == 3 for tensor in load(fused).values())  # it is really fused
    assert set(reader.tensors) == set(expected)
    for tensor_name, tensor in expected.items():
        assert reader.info(tensor_name).shape == tuple(tensor.shape)
        assert reader.info(tensor_name).num_bytes == tensor.nbytes
        assert torch.equal(reader.tensor(tensor_name), tensor)


@every_family
def test_transformers_fuses_gate_above_up(tiny_model: TinyModel, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(name), dtype=torch.bfloat16)
    experts = model.model.layers[-1].mlp.experts
    assert not experts.is_transposed
    assert experts.is_concatenated
    assert experts.has_gate
    assert not experts.has_bias


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_both_layouts_are_packed_to_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    folders = _both(tiny_model(name), tmp_path)
    plan = _plan(folders[0])
    packed = [write_packed(f, tmp_path / f"packed{n}", plan) for n, f in enumerate(folders)]
    assert verify_checkpoint(packed[1]) == []
    (first,), (second,) = (list(folder.glob("*.safetensors")) for folder in packed)
    assert first.read_bytes() == second.read_bytes()


def test_fused_tensors_may_be_called_weight(tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    parts = {
        matrix: torch.stack([tensors.pop(f"{CONTAINERS[0]}.{e}.{matrix}.weight") for e in range(4)])
        for matrix in ("w1", "w2", "w3")
    }
    tensors[f"{FUSED_UP}.weight"] = torch.cat([parts["w1"], parts["w3"]], 1)
    tensors[f"{CONTAINERS[0]}.down_proj.weight"] = parts["w2"]
    source = SourceModel.open(write_checkpoint(tmp_path, tensors))  # its other layer is not fused
    for name, tensor in mixtral_tensors().items():
        assert torch.equal(source.tensor(name), tensor)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4, 2 * INTERMEDIATE, 64), f"{CONTAINERS[0]}.0.w1.weight is stored twice"),
        (torch.zeros(4, 64), r"gate_up_proj has shape \[4, 64\], expected \[experts, 2"),
        (torch.zeros(4, 3, 64), r"gate_up_proj has shape \[4, 3, 64\], expected \[experts, 2"),
    ],
)
def test_what_cannot_be_cut_apart_is_refused(
    tmp_path: Path, tensor: torch.Tensor, message: str
) -> None:
    tensors = mixtral_tensors() | {FUSED_UP: tensor.bfloat16()}
    with pytest.raises(MoeqError, match=message):
        SourceModel.open(write_checkpoint(tmp_path, tensors))


def test_a_transposed_fused_tensor_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The router says how wide an expert's inputs are."""
    _, fused = _both(tiny_model("mixtral"), tmp_path)
    tensors = {n: t.mT if t.ndim == 3 else t for n, t in load(fused).items()}
    with pytest.raises(MoeqError, match=r"expected \[8, "):
        SourceModel.open(rewrite(fused, tmp_path / "transposed", tensors))
