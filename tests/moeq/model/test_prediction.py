"""Layers for multi-token prediction that are not whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeq
from moeq.checkpoint import SourceModel
from moeq.errors import MoeqError
from moeq.model.prediction import prediction_problems
from moeq.model.structure import check_structure, structure_problems
from support.checkpoints import Tensors, change_tensors
from support.models import add_prediction_layer
from support.prediction import LIKE_LAYERS, OTHERS, with_prediction
from support.sources import load
from vllm_moeq.format import write_manifest


@pytest.fixture(params=LIKE_LAYERS)
def model(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path: Path
) -> tuple[Path, str]:
    prefix = LIKE_LAYERS[request.param]
    return add_prediction_layer(tiny_model(request.param), tmp_path / "model", prefix), prefix


@pytest.mark.parametrize("family", [*LIKE_LAYERS, *OTHERS])
def test_every_tensor_of_a_prediction_layer_is_checked(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, start = with_prediction(tiny_model(family), tmp_path / "model", family)
    source = SourceModel.open(folder)
    reader, layers = source.reader, source.layers
    assert structure_problems(reader, layers) == []
    saved = {name: info for name, info in reader.tensors.items() if name.startswith(start)}
    assert saved.keys() == {name for name in load(folder) if name.startswith(start)}
    for name, info in saved.items():
        for broken in (None, info._replace(shape=(*info.shape, 2)), info._replace(dtype="I8")):
            del reader.tensors[name]
            if broken is not None:
                reader.tensors[name] = broken
            (problem,) = prediction_problems(reader, layers)
            assert problem.startswith(f"tensor {name} ")
            reader.tensors[name] = info
            assert not list(prediction_problems(reader, layers))


def test_a_prediction_of_two_layers_lacks_one(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, _ = with_prediction(tiny_model("nemotron_h"), tmp_path / "model", "nemotron_h")
    change_tensors(folder, lambda tensors: _without_the_layer(tensors, "mtp.layers.1."))
    source = SourceModel.open(folder)
    with pytest.raises(MoeqError, match=r"mtp\.layers\.1\.\S+ .* of a prediction layer is missing"):
        check_structure(source.reader, source.layers)


def _without_the_layer(tensors: Tensors, prefix: str) -> None:
    for name in [name for name in tensors if name.startswith(prefix)]:
        del tensors[name]


def _pruned(tensors: Tensors, prefix: str) -> None:
    _without_the_layer(tensors, f"{prefix}mlp.experts.7.")
    tensors[f"{prefix}mlp.gate.weight"] = tensors[f"{prefix}mlp.gate.weight"][:7].clone()


def _with_one_more(tensors: Tensors, prefix: str) -> None:
    tensors[f"{prefix}mlp.experts.8.up_proj.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_pruned, r"mlp\.experts\.7\.down_proj\.weight .* is missing; .*experts\.7\.gate_proj"),
        (_with_one_more, r"mlp\.experts\.8\.up_proj\.weight is of no expert: layers have 8 "),
    ],
)
def test_a_broken_prediction_layer_is_refused(
    model: tuple[Path, str], change: Callable[[Tensors, str], None], message: str
) -> None:
    folder, prefix = model
    change_tensors(folder, lambda tensors: change(tensors, prefix))
    source = SourceModel.open(folder)
    with pytest.raises(MoeqError, match=message):
        check_structure(source.reader, source.layers)


def test_what_is_beside_the_layers_is_not_enough(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = add_prediction_layer(tiny_model("qwen3_next"), tmp_path / "model", "mtp.layers.0.")
    change_tensors(folder, lambda tensors: _without_the_layer(tensors, "mtp.layers."))
    source = SourceModel.open(folder)
    with pytest.raises(MoeqError, match=r"mtp\.layers\.0\.\S+ .* of a prediction layer is missing"):
        check_structure(source.reader, source.layers)


def test_verify_names_what_a_prediction_layer_lacks(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = add_prediction_layer(tiny_model("deepseek_v3"), tmp_path / "model", "model.layers.2.")
    packed = tmp_path / "packed"
    moeq.quantize(folder, packed, bits=2, group_size=64, calib=None)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    assert moeq.verify(packed) == []
    (file,) = packed.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    index = packed / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))
    write_manifest(packed)
    (problem,) = moeq.verify(packed)
    assert problem == f"tensor {name} [128, 128] of a prediction layer is missing"
