"""Damaged or foreign checkpoints: the engine refuses them and says what is wrong."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import change_tensors
from support.engine import launch
from support.linear import pack_linear
from support.models import add_prediction_layer
from support.packed import pack_mixed

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ATTENTION = "model.layers.1.self_attn"
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w3"
CONTAINER = "model.layers.1.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def packed(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "packed"
    return pack_linear(pack_mixed(tiny_model("mixtral"), folder))


def _change_config(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _missing_tensor(model: Path) -> None:
    change_tensors(model, lambda tensors: tensors.pop(f"{EXPERT}.weight_zero_point"))


def _wrong_dtype(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.weight_scale"] = tensors[f"{EXPERT}.weight_scale"].bfloat16()

    change_tensors(model, change)


def _wrong_shape(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        packed_weight = tensors[f"{EXPERT}.weight_packed"]
        tensors[f"{EXPERT}.weight_packed"] = packed_weight[:, :-1].contiguous()

    change_tensors(model, change)


def _width_of_another_expert(model: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        widths = config["quantization_config"]["expert_bits"][CONTAINER]["w13"]
        widths[5] = 8 if widths[5] != 8 else 4

    _change_config(model, change)


def _expert_missing_in_plan(model: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        for widths in config["quantization_config"]["expert_bits"][CONTAINER].values():
            widths.pop()

    _change_config(model, change)


def _layer_missing_in_plan(model: Path) -> None:
    _change_config(
        model, lambda config: config["quantization_config"]["expert_bits"].pop(CONTAINER)
    )


def _missing_dense_weight(model: Path) -> None:
    change_tensors(model, lambda tensors: tensors.pop(f"{ATTENTION}.k_proj.weight_packed"))


def _linear_targets(config: dict[str, Any], bits: int) -> list[str]:
    groups = config["quantization_config"]["linear"]["config_groups"].values()
    (targets,) = (group["targets"] for group in groups if group["weights"]["num_bits"] == bits)
    return targets


def _dense_layer_of_two_widths(model: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        _linear_targets(config, 8).remove(f"{ATTENTION}.k_proj")
        _linear_targets(config, 4).append(f"{ATTENTION}.k_proj")

    _change_config(model, change)


def _width_of_another_dense_layer(model: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        _linear_targets(config, 4).remove(f"{ATTENTION}.o_proj")
        _linear_targets(config, 8).append(f"{ATTENTION}.o_proj")

    _change_config(model, change)


def _width_seven(model: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["expert_bits"][CONTAINER]["w2"][3] = 7

    _change_config(model, change)


def _unknown_version(model: Path) -> None:
    _change_config(model, lambda config: config["quantization_config"].update(format_version=2))


def _no_quantization_config(model: Path) -> None:
    _change_config(model, lambda config: config.pop("quantization_config"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _missing_tensor,
            "the checkpoint lacks 1 expert tensors, first w3.weight_zero_point of expert 5",
        ),
        (_wrong_dtype, "expert 5 w3 weight_scale is torch.bfloat16"),
        (_wrong_shape, "expert 5 w3 weight_packed is torch.uint8"),
        (_width_of_another_expert, "the checkpoint does not follow its own bit plan"),
        (_expert_missing_in_plan, "expert_bits lists 7 experts, the model has 8"),
        (_layer_missing_in_plan, "expert_bits has no entry for layer 1"),
        (
            _missing_dense_weight,
            f"the checkpoint lacks packed weights: {ATTENTION}.k_proj.weight_packed. Check the",
        ),
        (
            _dense_layer_of_two_widths,
            f"'{ATTENTION}.q_proj': 8, '{ATTENTION}.k_proj': 4, '{ATTENTION}.v_proj': 8",
        ),
        (
            _width_of_another_dense_layer,
            f"{ATTENTION}.o_proj.weight_packed is torch.int32 [128, 16], expected "
            f"{ATTENTION}.o_proj.weight_packed in torch.int32 with 32 columns: the checkpoint does "
            "not follow its own bit plan",
        ),
        (_width_seven, "width 7 of expert 3 is not one of [1, 2, 3, 4, 8]"),
        (_unknown_version, "format_version 2 is not supported"),
        (_no_quantization_config, "config.json has no quantization_config"),
    ],
)
def test_is_refused(
    packed: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(packed, model)
    (model / "moeq_manifest.json").unlink()  # its size check would speak first
    damage(model)

    process = launch(model, quantization="moeq")

    assert process.returncode != 0
    assert message in process.log


def _refusal(model: Path, missing: Iterable[str], **llm_options: Any) -> str:
    """Take tensors out of a checkpoint, load the rest, return what is said of the parameters."""
    (model / "moeq_manifest.json").unlink()
    change_tensors(model, lambda tensors: [tensors.pop(name) for name in missing])

    process = launch(model, **llm_options)

    assert process.returncode != 0
    log = process.log
    match = re.search(r"the checkpoint lacks weights, or holds NaN: (.*)\. Check it", log)
    assert match is not None, log[-6000:]
    return match[1]


@pytest.mark.parametrize(
    ("family", "missing", "refusal"),
    [
        (
            "mixtral",
            [
                "model.embed_tokens.weight_scale",
                "model.layers.0.input_layernorm.weight",
                "model.layers.1.self_attn.k_proj.weight_scale",
                "model.layers.1.block_sparse_moe.gate.weight",
                "model.norm.weight",
                "lm_head.weight_scale",
            ],
            "model.embed_tokens.weight_scale (1280 of 1280), "
            "model.layers.0.input_layernorm.weight (128 of 128), "
            # vLLM holds q, k and v in one parameter.
            "model.layers.1.self_attn.qkv_proj.weight_scale (256 of 1024), "
            "model.layers.1.block_sparse_moe.gate.weight (1024 of 1024), "
            "model.norm.weight (128 of 128) and 1 more",
        ),
        (
            "qwen2_moe",
            [
                "model.layers.0.self_attn.v_proj.bias",
                "model.layers.1.mlp.shared_expert_gate.weight",
            ],
            "model.layers.0.self_attn.qkv_proj.bias (64 of 256), "
            "model.layers.1.mlp.shared_expert_gate.weight (128 of 128)",
        ),
        (
            "qwen3_moe",
            ["model.layers.0.self_attn.q_norm.weight", "lm_head.weight"],
            "model.layers.0.self_attn.q_norm.weight (32 of 32), lm_head.weight (40960 of 40960)",
        ),
        (
            "deepseek_v3",
            [
                "model.layers.1.self_attn.kv_a_layernorm.weight",
                "model.layers.1.mlp.gate.e_score_correction_bias",
            ],
            "model.layers.1.self_attn.kv_a_layernorm.weight (512 of 512), "
            "model.layers.1.mlp.gate.e_score_correction_bias (8 of 8)",
        ),
        (
            "gpt_oss",
            [
                "model.layers.1.self_attn.sinks",
                "model.layers.1.self_attn.o_proj.bias",
                "model.layers.1.mlp.router.bias",
            ],
            "model.layers.1.attn.sinks (4 of 4), model.layers.1.attn.o_proj.bias (128 of 128), "
            "model.layers.1.mlp.router.bias (8 of 8)",
        ),
        (
            "gemma4_text",
            ["model.layers.1.layer_scalar"],  # a buffer
            "model.layers.1.layer_scalar (1 of 1)",
        ),
    ],
)
def test_parameters_that_are_not_filled_are_named(
    family: str,
    missing: list[str],
    refusal: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    packed = pack_mixed(tiny_model(family), tmp_path / "packed")
    if family == "mixtral":
        pack_linear(packed)

    assert _refusal(packed, missing) == refusal


def test_a_prediction_layer_lacks_a_norm(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    # vLLM leaves the embeddings of this one to be shared with the model's.
    model = add_prediction_layer(tiny_model("glm4_moe_lite"), tmp_path / "model", "model.layers.2.")
    packed = pack_mixed(model, tmp_path / "packed")

    refusal = _refusal(
        packed,
        ["model.layers.2.enorm.weight"],
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    )

    assert refusal == "model.layers.2.enorm.weight (128 of 128)"


def test_manifest_is_checked_before_loading(packed: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(packed, model)
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])

    process = launch(model)

    assert process.returncode != 0
    log = process.log
    assert f"{shard.name} has" in log
    assert "is damaged" in log


def test_impossible_kernel_is_refused(packed: Path) -> None:
    process = launch(packed, environment={"MOEQ_KERNEL": "warp-drive"})

    assert process.returncode != 0
    assert "MOEQ_KERNEL='warp-drive' is unknown" in process.log
