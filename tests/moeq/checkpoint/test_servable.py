"""Checkpoints with more than the model, or of models that vLLM would run otherwise."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN

import moeq
from moeq.checkpoint import SourceModel
from moeq.checkpoint.servable import is_left_out
from moeq.errors import MoeqError
from support.checkpoints import mixtral_tensors, write_checkpoint
from support.models import add_prediction_layer
from support.sources import load, rewrite

TinyModel = Callable[[str], Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 200)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("deepseek_v3", "model.layers.2."),
        ("qwen3_next", "mtp.layers.0."),
        ("hy_v3", "model.layers.2."),
        ("exaone_moe", "mtp.layers.0."),
    ],
)
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_layers_that_predict_more_tokens_stay_as_they_are(
    tiny_model: TinyModel, tmp_path: Path, text: Path, family: str, prefix: str, calibrated: bool
) -> None:
    plain = tiny_model(family)
    model = add_prediction_layer(plain, tmp_path / "model", prefix)
    options: dict[str, Any] = {"calib": None}
    if calibrated:
        options = {"strategy": "uniform", "method": "gptq", "calib": text, "nsamples": 4,
                   "seqlen": 32}  # fmt: skip
    packed = {}
    for source, out in ((plain, "without"), (model, "with")):
        moeq.quantize(source, tmp_path / out, bits=2, group_size=32, **options)
        packed[out] = load(tmp_path / out)
    assert moeq.verify(tmp_path / "with") == []

    original = load(model)
    more = {
        name: packed["with"].pop(name) for name in original if name.startswith((prefix, "mtp."))
    }
    assert any(".experts." in name for name in more)
    assert all(torch.equal(tensor, original[name]) for name, tensor in more.items())
    assert packed["with"].keys() == packed["without"].keys()
    assert all(
        torch.equal(packed["with"][name], packed["without"][name]) for name in packed["with"]
    )


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("glm5_next", "model.language_model.layers.2.mlp.experts.0.up_proj.weight"),
        ("minimax_m3_vl", "language_model.model.mtp.layers.0.block_sparse_moe.gate.weight"),
    ],
)
def test_prediction_layers_inside_vision_models_stay(model_type: str, name: str) -> None:
    text = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    assert is_left_out({"model_type": "mixtral", "text_config": text}, name)
    assert not is_left_out({"model_type": model_type, "text_config": text}, name)


@pytest.mark.parametrize(
    ("prefix", "config"),
    [("mtp.layers.0.", {}), ("model.layers.2.", {"num_nextn_predict_layers": 1})],
)
def test_prediction_layers_that_vllm_refuses_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str, config: dict[str, Any]
) -> None:
    plain = mixtral_tensors()
    last = "model.layers.1."
    more = {
        prefix + name.removeprefix(last): tensor.clone()
        for name, tensor in plain.items()
        if name.startswith(last)
    }
    source = write_checkpoint(tmp_path / "model", plain | more, num_hidden_layers=2, **config)
    with caplog.at_level(logging.WARNING):
        result = moeq.quantize(source, tmp_path / "out", bits=2, group_size=64, calib=None)
    (message,) = caplog.messages
    assert f"{len(more)} tensors of prediction layers are left out" in message
    assert any(name in message for name in more)
    assert f"{len(more)} tensors" in result.plan.provenance.details["left_out"]
    assert moeq.verify(tmp_path / "out") == []

    moeq.quantize(
        write_checkpoint(tmp_path / "plain", plain), tmp_path / "same", bits=2, group_size=64,
        calib=None,
    )  # fmt: skip
    expected, found = load(tmp_path / "same"), load(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*mixtral are served with silu only"),
        ({"moe_latent_size": 32}, "moe_latent_size 32.*not supported"),
        ({"model_type": "phimoe"}, "attention_bias False, but vLLM runs phimoe with True only"),
        ({"model_type": "phimoe", "attention_bias": True}, "lm_head_bias False, but vLLM"),
        (
            {"model_type": "lfm2_moe", "tie_word_embeddings": False},
            "tie_word_embeddings False, but",
        ),
        ({"model_type": "lfm2_moe", "tie_embedding": False}, "tie_embedding False, but vLLM"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ is of no layer .*num_hidden_layers 1 "),
        (
            {"num_hidden_layers": 1, "num_nextn_predict_layers": 0},
            r"model\.layers\.1\.\S+ is of no layer .*num_nextn_predict_layers 0",
        ),
    ],
)
def test_what_would_be_served_otherwise_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(MoeqError, match=message):
        SourceModel.open(write_checkpoint(tmp_path, **config))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])
def test_swish_is_silu_which_vllm_calls_nothing_else(
    tiny_model: TinyModel, tmp_path: Path, family: str
) -> None:
    model = Path(shutil.copytree(tiny_model(family), tmp_path / "swish"))
    stated = (model / "config.json").read_text()
    assert ACT2FN["swish"](torch.tensor([1.5])) == ACT2FN["silu"](torch.tensor([1.5]))
    (model / "config.json").write_text(
        stated.replace('"hidden_act": "silu"', '"hidden_act": "swish"')
    )
    configs = []
    for source, out in ((tiny_model(family), "a"), (model, "b")):
        moeq.quantize(source, tmp_path / out, bits=2, group_size=64, calib=None)
        config = json.loads((tmp_path / out / "config.json").read_text())
        config["quantization_config"].pop("provenance", None)
        configs.append(config)
    assert "swish" in (model / "config.json").read_text()
    assert configs[0] == configs[1]


def test_minimax_m3_has_the_activation_that_vllm_asks_for(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("minimax_m3_vl")
    moeq.quantize(model, tmp_path / "out", bits=2, group_size=64, calib=None)
    stated, written = (
        json.loads((folder / "config.json").read_text())["text_config"]["hidden_act"]
        for folder in (model, tmp_path / "out")
    )
    assert (stated, written) == ("silu", "swigluoai")  # the first is transformers' own word


@pytest.mark.parametrize(
    ("family", "key", "allowed"),
    [("gemma4_text", "hidden_activation", "gelu_pytorch_tanh"), ("nemotron_h", "mlp_hidden_act",
      "relu2")],
)  # fmt: skip
def test_activations_of_other_families_have_their_own_names(
    tiny_model: TinyModel, tmp_path: Path, family: str, key: str, allowed: str
) -> None:
    folder = tiny_model(family)
    config = json.loads((folder / "config.json").read_text())
    assert config[key] == allowed
    SourceModel.open(folder)
    changed = rewrite(folder, tmp_path / "changed", load(folder), **{key: "tanh"})
    with pytest.raises(MoeqError, match=f"{key} 'tanh'.*{allowed}"):
        SourceModel.open(changed)


@pytest.mark.parametrize(
    ("family", "key", "value", "only"),
    [("gpt_oss", "swiglu_limit", 3.0, "7.0"), ("olmoe", "clip_qkv", 8.0, "None")],
)
def test_what_vllm_takes_for_granted_is_refused_otherwise(
    tiny_model: TinyModel, tmp_path: Path, family: str, key: str, value: float, only: str
) -> None:
    model = Path(shutil.copytree(tiny_model(family), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(MoeqError, match=rf"{key} {value}, but vLLM runs {family} with {only} only"):
        SourceModel.open(model)


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_a_bias_that_vllm_does_not_add_is_told(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    tensors = load(tiny_model("phimoe"))
    tensors["lm_head.bias"][-1] = value
    model = rewrite(tiny_model("phimoe"), tmp_path / "model", tensors)
    moeq.plan(model, bits=2, group_size=32, strategy="uniform")
    assert ("vLLM does not add lm_head.bias, packed or not" in caplog.text) == (value != 0)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_nan_outside_the_experts_is_refused(tmp_path: Path, name: str) -> None:
    tensors = mixtral_tensors()
    tensors[name].view(-1)[-1] = torch.nan
    source = write_checkpoint(tmp_path / "model", tensors)
    with pytest.raises(MoeqError, match=f"{name} holds NaN: get the checkpoint again"):
        moeq.quantize(source, tmp_path / "out", bits=2, group_size=64, calib=None)
    assert not (tmp_path / "out").exists()
