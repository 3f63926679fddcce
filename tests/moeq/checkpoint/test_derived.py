"""What transformers says of models against the table of families, and models without a row."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import vllm_moeq.hf  # noqa: F401  makes transformers load packed checkpoints
from moeq.checkpoint import CheckpointReader, SourceModel
from moeq.checkpoint.derived import derived_family
from moeq.checkpoint.families import family_of
from moeq.checkpoint.verify import verify_checkpoint
from moeq.cli import main
from moeq.errors import MoeqError
from moeq.evaluation.reference import outputs
from moeq.model import ExpertSource
from moeq.model.layerwise import LayerwiseModel
from support.models import KNOWN, VOCABULARY, WITHOUT_A_ROW, load_model, make_config
from support.reference import dequantize_checkpoint
from vllm_moeq.format import BitPlan

UNDESCRIBED = {"gpt_oss", "llama4_text", "llama4", "deepseek_v4", "glm5_next", "minimax_m3_vl"}
"""Families whose experts have a gate of their own, or a class that transformers does not fuse."""
TOKENS = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


def _config(name: str) -> str:
    text: str = make_config(name).to_json_string(use_diff=False)
    return text


@pytest.mark.parametrize("name", KNOWN)
def test_the_table_says_what_transformers_says(name: str) -> None:
    family, derived = family_of({"model_type": name}), derived_family(_config(name))
    assert (derived is None) == (name in UNDESCRIBED)
    if derived is not None:
        for fact in ("experts", "router", "gate", "up", "down", "biased", "interleaved"):
            assert getattr(derived, fact) == getattr(family, fact)
        for start, canonical in derived.aliases:
            name_in_layer = f"model.layers.3.{start}"
            assert family.canonical_name(name_in_layer) == f"model.layers.3.{canonical}"


def test_shared_experts_are_not_taken_for_a_router() -> None:
    config = make_config("qwen3_next")
    config.num_experts = config.shared_expert_intermediate_size  # as released: both are 512
    derived = derived_family(config.to_json_string(use_diff=False))
    assert derived is not None and derived.router == "mlp.gate.weight"


@pytest.mark.parametrize("name", WITHOUT_A_ROW)
def test_a_model_without_a_row_is_read_as_transformers_does(
    name: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MOEQ_KERNEL", "reference")
    model, packed = tiny_model(name), tmp_path / "packed"
    options = ["--strategy", "random:1", "--calib", "none", "--method", "rtn", "--bits", "2.5"]
    derived_family.cache_clear()
    assert main(["quantize", str(model), "-o", str(packed), *options]) == 0
    assert f"{name!r} is not among the tested families" in caplog.text
    assert verify_checkpoint(packed) == []

    with torch.inference_mode():
        plain = load_model(dequantize_checkpoint(packed, tmp_path / "plain"))(TOKENS).logits
        original = load_model(model)(TOKENS).logits
        loaded = load_model(packed)(TOKENS).logits
    assert (plain - original).abs().max() > 0.1
    torch.testing.assert_close(loaded, plain, atol=2e-5, rtol=0)

    reader, cpu = CheckpointReader(packed), torch.device("cpu")
    plan = BitPlan.from_dict(reader.config["quantization_config"])
    by_layer = LayerwiseModel(SourceModel.open(model), cpu)
    sources = [ExpertSource.original(by_layer), ExpertSource.packed(reader, plan, cpu)]
    found = zip(*outputs(by_layer, sources, TOKENS), strict=True)
    for expected, sequences in zip((original, plain), found, strict=True):
        ours = torch.stack([output.log_probabilities for output in sequences])
        torch.testing.assert_close(ours, expected.log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", [["solar_open"], {}, 5, "timm_wrapper"])
def test_a_model_type_that_is_none_is_refused(model_type: object) -> None:
    with pytest.raises(MoeqError, match="is no supported Mixture-of-Experts family"):
        family_of({"model_type": model_type})


@pytest.mark.parametrize("name", ["longcat_flash", "llama"])
def test_what_transformers_does_not_describe_is_refused(name: str) -> None:
    config = AutoConfig.for_model(name, num_hidden_layers=1, num_layers=1)
    with pytest.raises(MoeqError, match=f"{name}.*is no supported Mixture-of-Experts family"):
        family_of(json.loads(config.to_json_string(use_diff=False)))


def test_a_configuration_of_no_model_is_refused() -> None:
    config = json.loads(_config("solar_open"))
    with pytest.raises(MoeqError, match="no supported .*describes no model that transformers"):
        family_of(config | {"hidden_size": "many"})
    with pytest.raises(MoeqError, match="has num_hidden_layers 1000000000, more than"):
        family_of(config | {"num_hidden_layers": 10**9})
