"""Damaged or foreign checkpoints: the engine refuses them and says what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.engine import launch
from support.packed import pack_mixed

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EXPERT = "model.layers.1.block_sparse_moe.experts.5.w3"
CONTAINER = "model.layers.1.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def packed(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_mixed(tiny_model("mixtral"), tmp_path_factory.mktemp("bad") / "packed")


def _change_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    shard = next(model.glob("*.safetensors"))
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


def _change_config(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _missing_tensor(model: Path) -> None:
    _change_tensors(model, lambda tensors: tensors.pop(f"{EXPERT}.weight_zero_point"))


def _no_head(model: Path) -> None:
    _change_tensors(model, lambda tensors: tensors.pop("lm_head.weight"))


def _part_of_attention_missing(model: Path) -> None:
    """Of q, k and v, which vLLM holds in one parameter."""
    name = "model.layers.1.self_attn.k_proj.weight"
    _change_tensors(model, lambda tensors: tensors.pop(name))


def _wrong_dtype(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.weight_scale"] = tensors[f"{EXPERT}.weight_scale"].bfloat16()

    _change_tensors(model, change)


def _wrong_shape(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        packed_weight = tensors[f"{EXPERT}.weight_packed"]
        tensors[f"{EXPERT}.weight_packed"] = packed_weight[:, :-1].contiguous()

    _change_tensors(model, change)


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
        (_no_head, "lm_head.weight: "),
        (_part_of_attention_missing, "model.layers.1.self_attn.qkv_proj.weight: "),
        (_wrong_dtype, "expert 5 w3 weight_scale is torch.bfloat16"),
        (_wrong_shape, "expert 5 w3 weight_packed is torch.uint8"),
        (_width_of_another_expert, "the checkpoint does not follow its own bit plan"),
        (_expert_missing_in_plan, "expert_bits lists 7 experts, the model has 8"),
        (_layer_missing_in_plan, "expert_bits has no entry for layer 1"),
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
    assert message in process.stdout + process.stderr


def test_manifest_is_checked_before_loading(packed: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(packed, model)
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])

    process = launch(model)

    assert process.returncode != 0
    log = process.stdout + process.stderr
    assert f"{shard.name} has" in log
    assert "is damaged" in log


def test_impossible_kernel_is_refused(packed: Path) -> None:
    process = launch(packed, environment={"MOEQ_KERNEL": "warp-drive"})

    assert process.returncode != 0
    assert "MOEQ_KERNEL='warp-drive' is unknown" in process.stdout + process.stderr
