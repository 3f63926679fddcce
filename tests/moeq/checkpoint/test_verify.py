"""``moeq verify`` finds every kind of damage, and names it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeq.checkpoint import CheckpointReader, SourceModel
from moeq.checkpoint.verify import read_plan, verify_checkpoint
from moeq.errors import MoeqError
from support.checkpoints import CONTAINERS, ROUTERS, plan_dict, write_checkpoint
from support.packed import write_packed
from vllm_moeq.format import BitPlan, LayerBits, write_manifest

SHARD = "model-00001-of-00001.safetensors"
W1 = f"{CONTAINERS[1]}.2.w1"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    source = write_checkpoint(folder / "source")
    return write_packed(source, folder / "out", BitPlan.from_dict(plan_dict()))


@pytest.fixture
def packed(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "out"))


def test_a_sound_checkpoint_has_no_problem(packed: Path) -> None:
    assert verify_checkpoint(packed) == []


def test_notes_beside_the_checkpoint_are_no_problem(packed: Path) -> None:
    (packed / "notes.txt").write_text("mine")
    assert verify_checkpoint(packed) == []


@pytest.mark.parametrize("file", [SHARD, "config.json", "README.md"])
def test_a_flipped_bit_anywhere_is_found(packed: Path, file: str) -> None:
    data = bytearray((packed / file).read_bytes())
    for place in (0, len(data) // 2, len(data) - 1):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        (packed / file).write_bytes(damaged)
        assert verify_checkpoint(packed) == [
            f"{file} is damaged: its SHA-256 differs from the manifest"
        ]


@pytest.mark.parametrize("file", [SHARD, "config.json", "model.safetensors.index.json"])
def test_a_truncated_or_missing_file_is_named(packed: Path, file: str) -> None:
    size = (packed / file).stat().st_size
    (packed / file).write_bytes((packed / file).read_bytes()[:-1])
    assert verify_checkpoint(packed) == [f"{file} has {size - 1} bytes instead of {size}"]
    (packed / file).unlink()
    assert verify_checkpoint(packed) == [f"{file} is missing"]


Tensors = dict[str, torch.Tensor]


def _drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def _copy(name: str, copy: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[copy] = tensors[name].clone()

    return change


def _reshape(name: str, dtype: torch.dtype | None = None) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:, :1].to(dtype).contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop(f"{W1}.weight_packed"), f"tensor {W1}.weight_packed is missing"),
        (_drop(f"{W1}.weight_zero_point"), f"tensor {W1}.weight_zero_point is missing"),
        (_drop(ROUTERS[0]), f"tensor {ROUTERS[0]} is missing"),
        (
            _drop(f"{CONTAINERS[0]}.0.w1.weight_scale"),
            f"tensor {CONTAINERS[0]}.0.w1.weight_scale is missing",
        ),
        (
            _reshape(f"{W1}.weight_packed"),
            f"tensor {W1}.weight_packed is U8 [128, 1], the plan's width 2 needs U8 [128, 16]",
        ),
        (
            _reshape(f"{W1}.weight_scale", torch.float32),
            f"tensor {W1}.weight_scale is F32 [128, 1], the plan's width 2 needs F16 [128, 1]",
        ),
        (
            _copy(f"{W1}.weight_packed", f"{CONTAINERS[1]}.4.w1.weight_packed"),
            f"tensor {CONTAINERS[1]}.4.w1.weight_packed is of no packed expert: the plan lists 4 "
            f"in {CONTAINERS[1]}",
        ),
        (
            _copy(f"{W1}.weight_scale", f"{W1}.weight"),
            f"tensor {W1}.weight is of no packed expert: the plan lists 4 in {CONTAINERS[1]}",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_plan_are_named(
    packed: Path, change: Callable[[Tensors], None], message: str
) -> None:
    tensors = load_file(packed / SHARD)
    change(tensors)
    save_file(tensors, packed / SHARD)
    index = {"weight_map": dict.fromkeys(tensors, SHARD)}
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    # As if it had been written so: the hashes are right, the contents are not.
    write_manifest(packed)
    assert verify_checkpoint(packed) == [message]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 2, "format_version 2 is not supported"),
        ("quant_method", "fp8", "'fp8'"),
        ("group_size", 48, "group_size 48"),
        ("expert_bits", {CONTAINERS[0]: {"w13": [7], "w2": [2]}}, "width 7"),
    ],
)
def test_a_config_that_this_version_cannot_read_is_named(
    packed: Path, key: str, value: object, message: str
) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"][key] = value
    (packed / "config.json").write_text(json.dumps(config))
    write_manifest(packed)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        verify_checkpoint(packed)


def test_a_group_size_that_does_not_divide_the_hidden_size_is_named(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (packed / "config.json").write_text(json.dumps(config))
    write_manifest(packed)
    assert verify_checkpoint(packed) == [
        f"{container}: group size 128 does not divide hidden_size 64" for container in CONTAINERS
    ]


def test_a_plan_for_more_experts_than_there_are_is_named(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["expert_bits"][CONTAINERS[1]] = {"w13": [2] * 5, "w2": [2] * 5}
    (packed / "config.json").write_text(json.dumps(config))
    write_manifest(packed)
    assert verify_checkpoint(packed) == [f"{ROUTERS[1]} has 4 experts, the plan 5"]


def test_a_folder_without_manifest_is_no_finished_checkpoint(packed: Path) -> None:
    (packed / "moeq_manifest.json").unlink()
    with pytest.raises(MoeqError, match="moeq_manifest.json is missing"):
        verify_checkpoint(packed)


def test_plan_is_read_back(packed: Path) -> None:
    plan = read_plan(CheckpointReader(packed))
    assert {name: bits.w13 for name, bits in plan.expert_bits.items()} == dict.fromkeys(
        CONTAINERS, (3, 2, 2, 1)
    )


def test_an_unquantized_checkpoint_has_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.json has no quantization_config"):
        read_plan(CheckpointReader(write_checkpoint(tmp_path)))


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (None, "is missing"),
        (torch.zeros(3).bfloat16(), r"is BF16 \[3\], expected \[192\] of F16"),
        (torch.zeros(192, dtype=torch.int32), r"is I32 \[192\], expected \[192\] of F16"),
    ],
)
def test_a_wrong_bias_is_found(
    tiny_model: Callable[[str], Path], tmp_path: Path, bias: torch.Tensor | None, message: str
) -> None:
    source = tiny_model("gpt_oss")
    bits = LayerBits((2,) * 8, (3,) * 8)
    plan = BitPlan(32, {layer.container: bits for layer in SourceModel.open(source).layers})
    packed = write_packed(source, tmp_path / "packed", plan)
    (file,) = packed.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.5.up_proj.bias"
    del tensors[name]
    if bias is not None:
        tensors[name] = bias
    save_file(tensors, file)
    index = packed / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))
    write_manifest(packed)
    (problem,) = verify_checkpoint(packed)
    assert re.search(f"{re.escape(name)} {message}", problem)


def test_a_router_that_is_no_matrix_is_named(packed: Path) -> None:
    tensors = load_file(packed / SHARD)
    tensors[ROUTERS[0]] = tensors[ROUTERS[0]].flatten()
    save_file(tensors, packed / SHARD)
    write_manifest(packed)
    assert f"{ROUTERS[0]} is [256], expected a matrix" in verify_checkpoint(packed)
