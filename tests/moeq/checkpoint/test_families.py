"""The family table against what transformers itself writes and computes with."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moeq.checkpoint import MoELayer, SourceModel
from moeq.checkpoint.families import FAMILIES, family_of
from moeq.checkpoint.fits import check_group_size, check_plan_fits, fitting_group_size
from moeq.errors import MoeqError
from support import models
from support.checkpoints import CONTAINERS, plan_dict, write_checkpoint
from support.models import decoder_layers, load_model
from support.reference import FUSED_IN_RELEASES
from support.sources import expert_tensors
from vllm_moeq.format import BitPlan

TinyModel = Callable[[str], Path]
every_family = pytest.mark.parametrize("name", models.KNOWN)


def _names_on_disk(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            names |= set(handle.keys())
    return names


def test_every_model_type_is_tested() -> None:
    tested = {*models.FAMILIES, *models.ENCODER_DECODERS}
    assert {name for family in FAMILIES for name in family.model_types} == tested


@pytest.mark.parametrize("name", [name for name in models.KNOWN if name not in FUSED_IN_RELEASES])
def test_all_routed_expert_weights_on_disk_are_found(tiny_model: TinyModel, name: str) -> None:
    folder = tiny_model(name)
    on_disk = {tensor for tensor in _names_on_disk(folder) if re.search(r"experts\.\d+\.", tensor)}
    found = {
        layer.tensor_name(expert, matrix)
        for layer in SourceModel.open(folder).layers
        for expert, matrix, _ in layer.weights()
    }
    assert found == on_disk


@every_family
def test_names_and_shapes_are_those_of_the_model_in_memory(
    tiny_model: TinyModel, name: str
) -> None:
    folder = tiny_model(name)
    model = load_model(folder, torch.bfloat16)
    decoders = decoder_layers(model)
    blocks = {
        index: experts
        for index, layer in enumerate(decoders)
        for path, experts in layer.named_modules()
        if path.split(".")[-1] == "experts"
    }
    source = SourceModel.open(folder)
    layers = source.layers
    assert [layer.index for layer in layers] == list(blocks)
    for layer in layers:
        experts = blocks[layer.index]
        router = source.tensor(layer.router)
        assert any(torch.equal(router, t) for t in _like_routers(decoders[layer.index], layer))
        assert layer.num_experts == len(experts.down_proj)
        assert decoders[layer.index].get_submodule(layer.family.norm)
        for expert in range(layer.num_experts):
            for (matrix, kind), tensor in expert_tensors(experts, expert).items():
                if kind == "weight":
                    assert layer.shape(matrix) == tuple(tensor.shape)
                name = layer.family.tensor_name(layer.container, expert, matrix, kind)
                assert torch.equal(source.tensor(name), tensor)


def _like_routers(decoder: torch.nn.Module, layer: MoELayer) -> list[torch.Tensor]:
    """Return the parameters that have a row for each expert, and hidden_size columns."""
    shape = (layer.num_experts, layer.hidden_size)
    return [tensor for tensor in decoder.parameters() if tuple(tensor.shape) == shape]


@pytest.mark.parametrize("model_type", ["llama", None])
def test_other_models_are_refused(model_type: str | None) -> None:
    with pytest.raises(MoeqError, match=f"{model_type}.*supported: .*mixtral"):
        family_of({"model_type": model_type})


def test_an_unknown_moe_model_is_refused_with_its_names(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, model_type="new_moe")
    names = r"model\.layers\.N\.block_sparse_moe\.experts\.N\.w1\.weight"
    with pytest.raises(MoeqError, match=f"'new_moe'.*{names}.*a row in .*families.py"):
        SourceModel.open(folder)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_dict({CONTAINERS[0]: [2] * 4}), f"another model: it lacks {CONTAINERS[1]}"),
        (
            plan_dict(dict.fromkeys([*CONTAINERS, "model.layers.2.mlp.experts"], [2] * 4)),
            "it names model.layers.2.mlp.experts, which the model does not have",
        ),
        (
            plan_dict({CONTAINERS[0]: [2] * 4, CONTAINERS[1]: [2] * 3}),
            f"{CONTAINERS[1]} has 4 experts, the plan lists 3",
        ),
        (plan_dict(group_size=128), "`group_size` 128 does not divide .*use `group_size` 64"),
    ],
)
def test_a_plan_for_another_model_is_refused(
    tmp_path: Path, plan: dict[str, object], message: str
) -> None:
    layers = SourceModel.open(write_checkpoint(tmp_path)).layers
    with pytest.raises(MoeqError, match=message):
        check_plan_fits(BitPlan.from_dict(plan), layers)


def _layers(hidden: int, *inner: int) -> list[MoELayer]:
    return [
        MoELayer(index, f"layers.{index}", "router", FAMILIES[0], 4, hidden, size)
        for index, size in enumerate(inner)
    ]


@pytest.mark.parametrize(
    ("hidden", "inner", "expected"),
    [
        (2048, [1408], 128),  # DeepSeek-V2-Lite
        (2880, [2880], 64),  # gpt-oss
        (4096, [704], 64),
        (4096, [176], 64),  # 192 with 32 as well, 256 with 128
        (4096, [88], 32),
        (160, [1024], 32),
        (4096, [128, 88], 128),
        (4096, [1440], 128),  # 1536, but a quarter of the scales that 32 has
        (4096, [8], 32),
    ],
)
def test_the_group_size_that_serves_in_the_least_memory_is_taken(
    hidden: int, inner: list[int], expected: int
) -> None:
    assert fitting_group_size(_layers(hidden, *inner)) == expected


def test_sizes_that_cannot_be_packed_are_named() -> None:
    with pytest.raises(MoeqError, match=r"hidden_size 100 of layers\.0: .* no multiple of 32, so"):
        fitting_group_size(_layers(100, 128))
    with pytest.raises(MoeqError, match="64 does not divide .*; it is no multiple of 32"):
        check_group_size(64, _layers(100, 128))
    with pytest.raises(MoeqError, match="hidden_size 2880 of layers.0; use `group_size` 64"):
        check_group_size(128, _layers(2880, 2880))
    what = r"intermediate_size 100 of layers\.1 is no multiple of 8: .* with zeros to 104 in the"
    with pytest.raises(MoeqError, match=what):
        check_group_size(64, _layers(128, 104, 100))
