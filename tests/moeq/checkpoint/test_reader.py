"""Reading checkpoints: what is found, and that each kind of damage is named."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeq.checkpoint import CheckpointReader, SourceModel
from moeq.checkpoint.reader import read_json, resolve_model
from moeq.errors import MoeqError
from support.checkpoints import (
    CONTAINERS,
    HIDDEN,
    INTERMEDIATE,
    NUM_EXPERTS,
    ROUTERS,
    Tensors,
    mixtral_tensors,
    write_checkpoint,
)

INDEX = "model.safetensors.index.json"
GATE = f"{CONTAINERS[1]}.2.w1.weight"


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_back(tmp_path: Path, shards: int) -> None:
    reader = CheckpointReader(write_checkpoint(tmp_path, shards=shards))
    expected = mixtral_tensors()
    assert set(reader.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(reader.tensor(name), tensor)
        assert reader.info(name).shape == tuple(tensor.shape)
        assert reader.info(name).num_bytes == tensor.nbytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_what_was_read_leaves_memory(tmp_path: Path) -> None:
    expected = {f"{i}": torch.full((1 << 20,), float(i)) for i in range(40)}  # of 4 MiB each
    save_file(expected, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    def mapped() -> int:
        """Return the bytes of files that count as this process's memory."""
        status = Path("/proc/self/status").read_text()
        found = re.search(r"RssFile:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) << 10

    reader = CheckpointReader(tmp_path)
    before, most = mapped(), 0
    first = reader.tensor("0")
    for name, tensor in expected.items():
        assert torch.equal(reader.tensor(name), tensor)
        most = max(most, mapped() - before)
    assert most < 80 << 20  # of 160 MiB
    assert torch.equal(first, expected["0"])  # a tensor in use stays


@pytest.mark.parametrize("shards", [1, 3])
def test_layers_are_in_order_with_their_sizes(tmp_path: Path, shards: int) -> None:
    tensors = dict(reversed(mixtral_tensors().items()))
    layers = SourceModel.open(write_checkpoint(tmp_path, tensors, shards)).layers
    assert [(layer.container, layer.router) for layer in layers] == list(
        zip(CONTAINERS, ROUTERS, strict=True)
    )
    for layer in layers:
        sizes = (layer.num_experts, layer.hidden_size, layer.intermediate_size)
        assert sizes == (NUM_EXPERTS, HIDDEN, INTERMEDIATE)


def _remove(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def _set(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


def _remove_layer_gates(tensors: Tensors) -> None:
    for expert in range(NUM_EXPERTS):
        del tensors[f"{CONTAINERS[1]}.{expert}.w1.weight"]


def _remove_layer_experts(tensors: Tensors) -> None:
    for name in list(tensors):
        if name.startswith(CONTAINERS[1]):
            del tensors[name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove(GATE), f"{GATE} is missing"),
        (_remove(f"{CONTAINERS[0]}.0.w1.weight"), f"{CONTAINERS[0]}.0.w1.weight is missing"),
        (_remove(f"{CONTAINERS[1]}.3.w2.weight"), f"{CONTAINERS[1]}.3.w2.weight is missing"),
        (_remove(ROUTERS[1]), f"{ROUTERS[1]} is missing"),
        (_remove_layer_gates, f"{CONTAINERS[1]}.0.w1.weight is missing"),
        (_remove_layer_experts, f"{CONTAINERS[1]}.0.w1.weight is missing"),
        (_set(GATE, torch.zeros(HIDDEN, INTERMEDIATE)), rf"{GATE} has shape \[64, 128\]"),
        (_set(GATE, torch.zeros(INTERMEDIATE)), rf"{GATE} has shape \[128\]"),
        (_set(f"{CONTAINERS[0]}.0.w1.weight", torch.zeros(8)), r"0.w1.weight has shape \[8\]"),
        (_set(GATE, torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.int8)), f"{GATE} has type I8"),
        (
            _set(GATE, torch.zeros(INTERMEDIATE, HIDDEN).to(torch.float8_e4m3fn)),
            f"{GATE} is F8_E4M3, which quantization_config in config.json does not explain",
        ),
        (_set(ROUTERS[0], torch.zeros(NUM_EXPERTS, 8)), rf"{ROUTERS[0]} has shape \[4, 8\]"),
        (_set(ROUTERS[0], torch.zeros(NUM_EXPERTS + 1, HIDDEN)), f"{CONTAINERS[0]}.4.w1.weight"),
    ],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path, damage: Callable[[Tensors], object], message: str
) -> None:
    tensors = mixtral_tensors()
    damage(tensors)
    with pytest.raises(MoeqError, match=message):
        SourceModel.open(write_checkpoint(tmp_path, tensors))


def test_experts_that_the_router_does_not_know_are_refused(tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    tensors[ROUTERS[0]] = tensors[ROUTERS[0]][:3].clone()
    with pytest.raises(MoeqError, match=f"{CONTAINERS[0]}.3"):
        SourceModel.open(write_checkpoint(tmp_path, tensors))


def test_a_tensor_that_only_the_index_promises_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    index = read_json(tmp_path / INDEX)
    index["weight_map"]["no.such.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(MoeqError, match="promises no.such.weight in model-00001"):
        CheckpointReader(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MoeqError, match="model-00002-of-00002.safetensors is missing"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int) -> None:
    write_checkpoint(tmp_path, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(MoeqError, match="model-00002-of-00002.safetensors is truncated or damaged"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_damaged_json_file_is_named(tmp_path: Path, file: str, text: str) -> None:
    write_checkpoint(tmp_path, shards=2)
    (tmp_path / file).write_text(text, encoding="latin-1")
    with pytest.raises(MoeqError, match=file):
        CheckpointReader(tmp_path)


def test_an_index_without_weight_map_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(MoeqError, match=f"{INDEX} has no weight_map"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    (write_checkpoint(tmp_path) / file).unlink()
    with pytest.raises(MoeqError, match=file):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("method", ["moeq", "gptq"])
def test_a_quantized_source_is_refused(tmp_path: Path, method: str) -> None:
    write_checkpoint(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(MoeqError, match=f"quantized already .*{method}"):
        SourceModel.open(tmp_path)


def test_a_checkpoint_with_unknown_names_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model.layers.0.mlp.experts.w13": torch.zeros(4, 8, 8)})
    with pytest.raises(MoeqError, match="like .*experts.gate_up_proj.*it has .*experts.w13"):
        SourceModel.open(tmp_path)


def test_asking_for_an_unknown_tensor_names_it(tmp_path: Path) -> None:
    with pytest.raises(MoeqError, match="tensor no.such.weight is missing"):
        CheckpointReader(write_checkpoint(tmp_path)).tensor("no.such.weight")


def test_other_files_are_those_that_are_no_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    for name in ("tokenizer.json", "README.md", ".cache", "extra.safetensors", "old.bin"):
        (tmp_path / name).write_text("x")
    for name in ("code/run.py", "additional_chat_templates/tools.jinja"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    files = {str(path) for path in CheckpointReader(tmp_path).other_files()}
    assert files == {"tokenizer.json", "README.md", "additional_chat_templates/tools.jinja"}


@pytest.mark.parametrize("model", ["/no/such/folder", "no-such-owner/no-such-model", "a b"])
def test_a_model_that_is_nowhere_is_named(model: str) -> None:
    with pytest.raises(MoeqError, match=model):
        resolve_model(model)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path) / "model.safetensors"
    with pytest.raises(MoeqError, match="model.safetensors is a file"):
        resolve_model(str(file))


def test_reading_a_folder_as_json_names_it(tmp_path: Path) -> None:
    with pytest.raises(MoeqError, match=str(tmp_path)):
        read_json(tmp_path)
