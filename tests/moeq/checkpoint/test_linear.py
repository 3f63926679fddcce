"""Which dense layers are quantized, against the classes of transformers."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeq import quantize, verify
from moeq.checkpoint import CheckpointReader, SourceModel
from moeq.checkpoint.linear import group_widths, linear_groups, uniform_linear_bits
from moeq.errors import MoeqError
from moeq.model.architecture import stored_names
from moeq.rounding import round_linear
from support.models import add_prediction_layer, load_model
from support.packed import mixed_plan, write_packed
from vllm_moeq.format import CheckpointConfig, write_manifest

ATTENTION = ("q_proj", "k_proj", "v_proj")
SHARED = "mlp.shared_experts"
EXPECTED = {
    "mixtral": {("self_attn", *ATTENTION), ("self_attn", "o_proj")},
    "qwen2_moe": {
        ("self_attn", *ATTENTION),
        ("self_attn", "o_proj"),
        ("mlp.shared_expert", "gate_proj", "up_proj"),
        ("mlp.shared_expert", "down_proj"),
    },
    "deepseek_v3": {
        ("self_attn", "q_a_proj", "kv_a_proj_with_mqa"),
        ("self_attn", "q_b_proj"),
        ("self_attn", "o_proj"),
        ("mlp", "gate_proj", "up_proj"),
        ("mlp", "down_proj"),
        ("mlp.shared_experts", "gate_proj", "up_proj"),
        ("mlp.shared_experts", "down_proj"),
    },
    "gpt_oss": {("self_attn", *ATTENTION), ("self_attn", "o_proj")},
    "lfm2_moe": {
        ("self_attn", *ATTENTION),
        ("self_attn", "out_proj"),
        ("feed_forward", "w1", "w3"),
        ("feed_forward", "w2"),
    },
    "qwen3_next": {
        ("self_attn", *ATTENTION),
        ("self_attn", "o_proj"),
        ("mlp.shared_expert", "gate_proj", "up_proj"),
        ("mlp.shared_expert", "down_proj"),
    },
}


@pytest.mark.parametrize("family", EXPECTED)
def test_layers_that_run_as_one_are_a_group(family: str, tiny_model: Callable[[str], Path]) -> None:
    source = SourceModel.open(tiny_model(family))
    found = set()
    for group in source.linear:
        inside = [re.sub(r".*\.layers\.\d+\.|\.weight$", "", name) for name in group.weights]
        (parent,) = {name.rpartition(".")[0] for name in inside}
        found.add((parent, *sorted((name.rpartition(".")[2] for name in inside), key=_place)))
        assert all(f"layers.{group.layer}." in name for name in group.weights)
    assert found == EXPECTED[family]


def _place(name: str) -> int:
    order = (*ATTENTION, "q_a_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj", "w1", "w3")
    return order.index(name) if name in order else 0


@pytest.mark.parametrize("family", EXPECTED)
def test_they_are_linear_layers_of_transformers_in_the_order_in_which_they_run(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    source = SourceModel.open(tiny_model(family))
    model = load_model(tiny_model(family))
    ours = {stored: name for name, stored in stored_names(model, source.reader.tensors).items()}
    calls: list[str] = []
    for group in source.linear:
        for name, shape in zip(group.weights, group.shapes, strict=True):
            module = model.get_submodule(ours[name].removesuffix(".weight"))
            assert isinstance(module, torch.nn.Linear)
            assert (module.out_features, module.in_features) == shape
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        model(torch.arange(8)[None])
    assert len(set(calls)) == sum(len(group.weights) for group in source.linear)
    in_order = [name for name in calls if "kv_a_proj" not in name]  # comes after q_b, unasked
    stages = [(g.layer, g.stage) for name in in_order for g in source.linear if name in g.weights]
    assert stages == sorted(stages)


@pytest.mark.parametrize(
    ("family", "elsewhere"),
    [
        ("minimax", {"attn_type_list": [0, 1]}),
        ("kimi_linear", {"linear_attn_config": {"kda_layers": [1], "full_attn_layers": [2]}}),
    ],
)
def test_linear_attention_keeps_its_width(
    family: str, elsewhere: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def quantized(folder: Path) -> set[tuple[int, str]]:
        names = [name for group in SourceModel.open(folder).linear for name in group.weights]
        return {(int(name.split(".")[2]), name.split(".")[-3]) for name in names}

    linear, full = list(load_model(tiny_model(family)).model.layers)
    assert type(linear.self_attn) is not type(full.self_attn)
    found = quantized(tiny_model(family))
    assert (0, "self_attn") not in found and (1, "self_attn") in found
    if family == "kimi_linear":
        assert (0, "block_sparse_moe") in found  # the dense MLP of that layer
    released = shutil.copytree(tiny_model(family), tmp_path / "released")
    config = json.loads((released / "config.json").read_text())
    del config["layer_types"]
    (released / "config.json").write_text(json.dumps(config | elsewhere))
    assert quantized(released) == found


def test_layers_that_share_keys_and_values_keep_their_width(
    tiny_model: Callable[[str], Path],
) -> None:
    source = SourceModel.open(tiny_model("mixtral"))
    before = linear_groups(source.reader, source.layers)
    del source.reader.tensors["model.layers.1.self_attn.v_proj.weight"]  # as Gemma-4's
    after = linear_groups(source.reader, source.layers)
    (lost,) = set(before) - set(after)
    assert lost.layer == 1 and lost.stage == 0 and len(after) == len(before) - 1


def test_embeddings_are_among_them_unless_they_have_two_uses(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def of(folder: Path) -> list[tuple[int, tuple[str, ...]]]:
        groups = SourceModel.open(folder, embeddings=True).linear
        return [(group.layer, group.weights) for group in groups if group.embeds]

    both = [(-1, ("model.embed_tokens.weight",)), (2, ("lm_head.weight",))]
    assert of(tiny_model("mixtral")) == both
    assert not [group for group in SourceModel.open(tiny_model("mixtral")).linear if group.embeds]
    tied = shutil.copytree(tiny_model("mixtral"), tmp_path / "tied")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert of(tied) == []
    (tied / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "two"}))
    layers = SourceModel.open(tiny_model("mixtral")).layers
    others = linear_groups(CheckpointReader(tied), layers)
    assert others and others == linear_groups(CheckpointReader(tied), layers, embeddings=True)
    model = add_prediction_layer(tiny_model("deepseek_v3"), tmp_path / "model", "model.layers.2.")
    assert of(tiny_model("deepseek_v3")) == both and of(model) == []
    with pytest.raises(MoeqError, match="embeddings of this model stay in 16 bits"):
        quantize(model, tmp_path / "out", calib=None, dense_bits=8, quantize_embeddings=True)


def test_a_packed_checkpoint_with_parts_of_two_widths_is_told(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = SourceModel.open(tiny_model("mixtral"))
    plan = mixed_plan(tiny_model("mixtral"))
    bits = uniform_linear_bits(source.linear, 8, plan.group_size)
    packed = write_packed(tiny_model("mixtral"), tmp_path / "out", replace(plan, linear_bits=bits))
    assert verify(packed) == []
    (file,) = packed.glob("*.safetensors")
    tensors, config = load_file(file), json.loads((packed / "config.json").read_text())
    name = "model.layers.0.self_attn.k_proj"
    rounded = round_linear(source.tensor(f"{name}.weight"), 4, plan.group_size)
    save_file(tensors | rounded.named(f"{name}.weight"), file, metadata={"format": "pt"})
    groups = CheckpointConfig(replace(plan, linear_bits=bits | {name: 4})).to_dict()
    config["quantization_config"] = groups
    (packed / "config.json").write_text(json.dumps(config))
    write_manifest(packed)
    (problem,) = verify(packed)
    assert "q_proj.weight" in problem and "are one layer in vLLM and need one width" in problem


def test_a_plan_that_does_not_fit_is_refused_by_name(
    tiny_model: Callable[[str], Path],
) -> None:
    source = SourceModel.open(tiny_model("mixtral"))
    plan = mixed_plan(tiny_model("mixtral"))
    fits = uniform_linear_bits(source.linear, 8, plan.group_size)
    assert set(group_widths(replace(plan, linear_bits=fits), source.linear).values()) == {8}
    query = "model.layers.0.self_attn.q_proj"
    for bits, message in (
        (fits | {query: 4}, "q_proj.weight and .*v_proj.weight are one layer in vLLM"),
        ({name: 8 for name in fits if name != query}, "need one width, not"),
        (fits | {"lm_head": 8}, "names lm_head, which is no dense layer"),
    ):
        with pytest.raises(MoeqError, match=message):
            group_widths(replace(plan, linear_bits=bits), source.linear)
