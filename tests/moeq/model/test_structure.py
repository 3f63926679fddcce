"""What is on disk against the model that transformers builds of ``config.json``."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import moeq
from moeq.checkpoint import SourceModel
from moeq.cli import main
from moeq.errors import MoeqError
from moeq.model import structure
from moeq.model.structure import check_structure, structure_problems
from support.checkpoints import (
    CONTAINERS,
    HIDDEN,
    ROUTERS,
    Tensors,
    change_tensors,
    mixtral_tensors,
    write_checkpoint,
)
from support.models import ENCODER_DECODERS, FAMILIES
from support.sources import load, rewrite
from vllm_moeq.format import write_manifest

TinyModel = Callable[[str], Path]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODER_DECODERS])
def test_all_tensors_outside_the_experts_are_checked(tiny_model: TinyModel, name: str) -> None:
    source = SourceModel.open(tiny_model(name))
    reader, layers = source.reader, source.layers
    assert structure_problems(reader, layers) == []
    experts = tuple(f"{layer.container}." for layer in layers)
    saved = {key: info for key, info in reader.tensors.items() if not key.startswith(experts)}
    wrong = {key: info._replace(shape=(*info.shape, 2)) for key, info in saved.items()}

    reader.tensors |= wrong
    assert _named(structure_problems(reader, layers)) == saved.keys()
    for key in saved:
        del reader.tensors[key]
    assert _named(structure_problems(reader, layers)) == saved.keys()


def test_deepseek_v4_may_have_the_names_of_its_release(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    plain = tiny_model("deepseek_v4")
    names = {"embed_tokens.weight": "embed.weight", "hc_head.hc_": "hc_head_"}
    tensors = {}
    for name, tensor in load(plain).items():
        name = name.removeprefix("model.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    released = rewrite(plain, tmp_path / "released", tensors)
    moeq.quantize(released, tmp_path / "out", bits=2, group_size=64, calib=None)
    assert moeq.verify(tmp_path / "out") == []
    del tensors["norm.weight"]
    source = SourceModel.open(rewrite(plain, tmp_path / "without", tensors))
    with pytest.raises(MoeqError, match=r"tensor model\.norm\.weight \[128\] is missing"):
        check_structure(source.reader, source.layers)


def _named(problems: list[str]) -> set[str]:
    return {problem.split()[1] for problem in problems}


def _remove_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        del tensors[name]


def _prune(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(f"{CONTAINERS[1]}.3.")]:
        del tensors[name]
    tensors[ROUTERS[1]] = tensors[ROUTERS[1]][:3].clone()


def _nothing(tensors: Tensors) -> None:
    """Change only the config."""


@pytest.mark.parametrize(
    ("change", "config", "messages"),
    [
        (lambda t: t.pop(HEAD), {}, [rf"tensor {HEAD} \[32, 64\] is missing"]),
        (lambda t: t.pop(NORM), {}, [rf"tensor {NORM} \[64\] is missing"]),
        (
            lambda t: t.update({QUERY: torch.zeros(32, HIDDEN)}),
            {},
            [rf"tensor {QUERY} in model.safetensors is \[32, 64\], .* it \[64, 64\]"],
        ),
        (_nothing, {"vocab_size": 40}, [rf"{EMBEDDINGS} .* is \[32, 64\], .* it \[40, 64\]", HEAD]),
        (
            _prune,
            {"num_local_experts": 4},
            [rf"{ROUTERS[1]} .* \[3, 64\]", rf"{CONTAINERS[1]} holds 3 experts .* says 4 of"],
        ),
        (_nothing, {"num_local_experts": 5}, [rf"{CONTAINERS[0]} holds 4 experts .* says 5 of"]),
        (_nothing, {"intermediate_size": 256}, [r"4 experts of 64 x 128, .* 4 of 64 x 256"]),
        (
            _remove_layer,
            {"num_hidden_layers": 2},
            [rf"{CONTAINERS[1]} is missing: .* the layer experts; .* and 3 more"],
        ),
        (_nothing, {"tie_word_embeddings": True}, [f"{HEAD} differs from {EMBEDDINGS}, .* false"]),
        (_nothing, {"num_attention_heads": "x"}, ["describes no model .*num_attention"]),
        (
            lambda t: t.update({QUERY: torch.zeros(HIDDEN, HIDDEN, dtype=torch.int8)}),
            {},
            [f"tensor {QUERY} in model.safetensors is I8, not floating point"],
        ),
        (
            lambda t: t.update({"norm.weight": t.pop("model.norm.weight")}),
            {},
            ["tensor norm.weight must be called model.norm.weight"],
        ),
        (
            lambda t: t.update({"norm.weight": t["model.norm.weight"].clone()}),
            {},
            ["norm.weight is there twice, the other one under another name"],
        ),
    ],
)  # fmt: skip
def test_what_config_does_not_describe_is_named(
    tmp_path: Path,
    change: Callable[[Tensors], object],
    config: dict[str, Any],
    messages: list[str],
) -> None:
    tensors = mixtral_tensors()
    change(tensors)
    source = SourceModel.open(write_checkpoint(tmp_path, tensors, **config))
    for message in messages:
        with pytest.raises(MoeqError, match=rf"{tmp_path}.*{message}"):
            check_structure(source.reader, source.layers)


def test_only_the_first_problems_are_told(tmp_path: Path) -> None:
    tensors = {name: t for name, t in mixtral_tensors().items() if "self_attn" not in name}
    source = SourceModel.open(write_checkpoint(tmp_path, tensors))
    with pytest.raises(MoeqError, match="k_proj.* and 3 more. Get the checkpoint again") as error:
        check_structure(source.reader, source.layers)
    assert str(error.value).count("is missing") == 5


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_may_be_left_out_or_the_same(tmp_path: Path, same: bool) -> None:
    tensors = mixtral_tensors()
    tensors.pop(HEAD)
    if same:
        tensors[HEAD] = tensors[EMBEDDINGS].clone()
    source = SourceModel.open(write_checkpoint(tmp_path, tensors, tie_word_embeddings=True))
    check_structure(source.reader, source.layers)


def test_tensors_that_the_model_does_not_have_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = mixtral_tensors() | {"model.extra.weight": torch.ones(2), rotary: torch.ones(8)}
    source = SourceModel.open(write_checkpoint(tmp_path, tensors))
    check_structure(source.reader, source.layers)
    (message,) = caplog.messages
    assert "has no model.extra.weight; vLLM may refuse" in message


@pytest.mark.parametrize(
    ("oldest", "model_type", "message"),
    [
        ("5", "of_tomorrow", f"{transformers.__version__} does not know model_type 'of_tomorrow'"),
        ("99", "mixtral", f"transformers {transformers.__version__} is older than 99"),
    ],
)
def test_a_model_that_transformers_does_not_know_is_not_checked(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    oldest: str,
    model_type: str,
    message: str,
) -> None:
    tensors = mixtral_tensors()
    tensors.pop(HEAD)
    source = SourceModel.open(write_checkpoint(tmp_path, tensors))
    source.reader.config["model_type"] = model_type
    monkeypatch.setattr(structure, "OLDEST", Version(oldest))
    with caplog.at_level(logging.INFO):
        assert structure_problems(source.reader, source.layers) == []
    assert message in caplog.text


def test_every_command_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = write_checkpoint(tmp_path / "sound")
    model = write_checkpoint(tmp_path / "model")
    change_tensors(model, lambda tensors: tensors.pop(HEAD))
    options: dict[str, Any] = {"bits": 2, "group_size": 64, "calib": None}
    text = tmp_path / "text.txt"
    text.write_text("x" * 1000)
    message = f"{HEAD} .* is missing"

    command = f"quantize {model} -o {tmp_path / 'out'} --bits 2 --calib none"
    assert main(command.split()) == 1
    assert f"tensor {HEAD} [32, 64] is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(MoeqError, match=message):
        moeq.plan(model, **options)
    with pytest.raises(MoeqError, match=message):
        moeq.compare(model, tmp_path / "compared", text=text)

    moeq.quantize(sound, tmp_path / "out", **options)
    change_tensors(tmp_path / "out", lambda tensors: tensors.pop(HEAD))
    index = tmp_path / "out" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"][HEAD]
    index.write_text(json.dumps(data))
    write_manifest(tmp_path / "out")  # the old one would speak first
    assert moeq.verify(tmp_path / "out") == [f"tensor {HEAD} [32, 64] is missing"]
    with pytest.raises(MoeqError, match=message):
        moeq.evaluate(tmp_path / "out", against=sound, text=text)
