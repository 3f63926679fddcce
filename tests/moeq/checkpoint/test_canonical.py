"""Every layout of a model is read, and packed, as the same tensors."""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeq.checkpoint import SourceModel
from moeq.checkpoint.families import family_of
from moeq.checkpoint.verify import verify_checkpoint
from moeq.errors import MoeqError
from support import models
from support.checkpoints import CONTAINERS, INTERMEDIATE, mixtral_tensors, write_checkpoint
from support.models import NUM_EXPERTS, as_released, decoder_layers, load_model
from support.packed import write_packed
from support.reference import FUSED_IN_RELEASES
from support.sources import expert_tensors, load, rewrite
from vllm_moeq.format import BitPlan, LayerBits

TinyModel = Callable[[str], Path]
every_family = pytest.mark.parametrize("name", models.KNOWN)
FUSED_UP = f"{CONTAINERS[0]}.gate_up_proj"


def _both(source: Path, folder: Path) -> tuple[Path, Path]:
    """Save a model with a tensor per expert, and as transformers has it in memory."""
    model = load_model(source, torch.bfloat16)
    model_type = json.loads((source / "config.json").read_text())["model_type"]
    if model_type in FUSED_IN_RELEASES:
        rewrite(source, folder / "split", _split(model, source))
        return folder / "split", source
    model.save_pretrained(folder / "split")
    if model_type in models.RENAMED_IN_MEMORY:
        rewrite(folder / "split", folder / "fused", _fused(load(folder / "split")))
    else:
        model.save_pretrained(folder / "fused", save_original_format=False)
    return folder / "split", folder / "fused"


def _split(model: Any, source: Path) -> dict[str, torch.Tensor]:
    """Have a tensor for each expert of a model whose releases are fused."""
    config = json.loads((source / "config.json").read_text())
    family, fused = family_of(config), FUSED_IN_RELEASES[config["model_type"]]
    of_experts = re.compile(rf"(.*layers\.(\d+)\.)({'|'.join(fused)})(_bias)?")
    split: dict[str, torch.Tensor] = {}
    for name, tensor in load(source).items():
        match = of_experts.fullmatch(name)
        if match is None:
            split[name] = tensor
            continue
        experts = _experts(decoder_layers(model)[int(match[2])])
        for expert in range(NUM_EXPERTS):
            for (matrix, kind), part in expert_tensors(experts, expert).items():
                split[family.tensor_name(match[1] + family.experts, expert, matrix, kind)] = part
    return split


def _experts(layer: torch.nn.Module) -> Any:
    (experts,) = (m for path, m in layer.named_modules() if path.split(".")[-1] == "experts")
    return experts


def _fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fuse the experts alone: other names stay as they are."""
    fused: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            fused[name] = tensor
        else:
            experts[match[1]][int(match[2]), match[3]] = tensor
    for container, parts in experts.items():
        kinds = ("w1", "w3", "w2") if (0, "w1") in parts else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (
            torch.stack([parts[i, kind] for i in range(NUM_EXPERTS)]) for kind in kinds
        )
        fused[f"{container}.gate_up_proj"] = torch.cat([gate, up], 1)
        fused[f"{container}.down_proj"] = down
    return fused


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
    released, fused = _both(tiny_model(name), tmp_path)
    expected, reader = SourceModel.open(released).reader, SourceModel.open(fused).reader
    assert any(tensor.ndim == 3 for tensor in load(fused).values())  # it is really fused
    assert reader.tensors.keys() == set(map(_in_memory, expected.tensors))
    for tensor_name, tensor in load(released).items():
        ours = _in_memory(tensor_name)
        assert reader.info(ours).shape == tuple(tensor.shape)
        assert reader.info(ours).num_bytes == tensor.nbytes
        assert torch.equal(reader.tensor(ours), tensor)


def _in_memory(name: str) -> str:
    """Call Nemotron-H's body as transformers does; vLLM takes both names."""
    return as_released(re.sub(r"^backbone\.", "model.", name))


@every_family
def test_experts_are_as_transformers_has_them(tiny_model: TinyModel, name: str) -> None:
    model = load_model(tiny_model(name), torch.bfloat16)
    experts = _experts(decoder_layers(model)[-1])
    family = family_of({"model_type": name})
    # Llama-4's experts are as the defaults, but do not say so.
    assert getattr(experts, "is_concatenated", True) != family.interleaved
    assert getattr(experts, "has_gate", True) == (family.gate is not None)
    assert getattr(experts, "has_bias", False) == family.biased


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
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
    ("gate_up", "down", "message"),
    [
        ((4, 2 * INTERMEDIATE, 64), (4, 64, INTERMEDIATE), f"{CONTAINERS[0]}.0.w1.weight is stor"),
        (
            (4, 64),
            (4, 64, INTERMEDIATE),
            r"has gate_up_proj \[4, 64\] and down_proj \[4, 64, 128\]",
        ),
        ((4, 3, 64), (4, 64, INTERMEDIATE), r"expected gate_up_proj \[experts, 2 \* intermediate"),
        ((4, 2 * INTERMEDIATE, 64), None, f"{CONTAINERS[0]} lacks down_proj"),
    ],
)
def test_what_cannot_be_cut_apart_is_refused(
    tmp_path: Path, gate_up: tuple[int, ...], down: tuple[int, ...] | None, message: str
) -> None:
    tensors = mixtral_tensors() | {FUSED_UP: torch.zeros(gate_up).bfloat16()}
    if down is not None:
        tensors[f"{CONTAINERS[0]}.down_proj"] = torch.zeros(down).bfloat16()
    with pytest.raises(MoeqError, match=message):
        SourceModel.open(write_checkpoint(tmp_path, tensors))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("gpt_oss", "down_proj_bias", r"has down_proj_bias \[8, 3\], expected \[8, 128\]"),
        ("gpt_oss", "gate_up_proj_bias", r"has gate_up_proj_bias \[8, 3\], expected \[8, 384\]"),
        ("qwen3_vl_moe", "down_proj_bias", "has down_proj_bias, which experts of this family have"),
    ],
)
def test_biases_of_another_kind_are_refused(
    tiny_model: TinyModel, tmp_path: Path, name: str, tensor: str, message: str
) -> None:
    tensors = load(tiny_model(name))
    down = next(name for name in tensors if name.endswith("experts.down_proj"))
    tensors[down.removesuffix("down_proj") + tensor] = torch.zeros(8, 3).bfloat16()
    with pytest.raises(MoeqError, match=message):
        SourceModel.open(rewrite(tiny_model(name), tmp_path / "changed", tensors))


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_transposed_fused_tensors_are_read_by_their_shapes(
    tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    """Mixtral's experts are wider than they are deep; Granite's are square."""
    _, fused = _both(tiny_model(name), tmp_path)
    expected = SourceModel.open(fused).reader
    tensors = {n: t.mT if t.ndim == 3 else t for n, t in load(fused).items()}
    reader = SourceModel.open(rewrite(fused, tmp_path / "transposed", tensors)).reader
    assert reader.tensors.keys() == expected.tensors.keys()
    for tensor_name in expected.tensors:
        assert torch.equal(reader.tensor(tensor_name), expected.tensor(tensor_name))
