"""Packed Switch Transformers in transformers, against the dequantized ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, SwitchTransformersForConditionalGeneration

from support.models import load_model
from support.packed import pack_mixed
from support.reference import dequantize_checkpoint
from support.sources import load, rewrite
from vllm_moeq.format import FormatError, check_manifest
from vllm_moeq.hf import MoeqConfig
from vllm_moeq.hf.switch import PackedSwitchExperts

TINY = "switch_transformers"
LAST = "decoder.block.1.layer.2.mlp"
TOKENS = torch.arange(3, 35).view(2, 16)
SOURCES = {
    # Filling, and so many tokens alike that experts overflow.
    "input_ids": torch.cat([TOKENS, torch.full((2, 8), 7), torch.full((2, 2), 2)], 1),
    "attention_mask": torch.tensor([[1] * 26, [1] * 24 + [0] * 2]),
}


@pytest.fixture(scope="module")
def packed(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a packed checkpoint with all widths; the last group of 176 columns is half."""
    return pack_mixed(tiny_model(TINY), tmp_path_factory.mktemp("hf") / "packed")


@pytest.fixture(scope="module")
def dequantized(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(dequantize_checkpoint(packed, tmp_path_factory.mktemp("hf") / "plain"))


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**SOURCES, decoder_input_ids=TOKENS).logits
    return logits


@pytest.mark.parametrize("family", [TINY])  # for the table of families
def test_equals_the_dequantized_model(
    family: str, packed: Path, dequantized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _logits(dequantized)
    plain = load_model(packed, quantization_config=MoeqConfig(dequantize=True))
    weights = dequantized.state_dict()
    assert plain.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], t) for name, t in plain.state_dict().items())
    assert not hasattr(plain.config, "quantization_config")

    model = load_model(packed)
    experts = [module for module in model.modules() if isinstance(module, PackedSwitchExperts)]
    assert len(experts) == 3
    assert model.lm_head.weight is model.shared.weight is model.decoder.embed_tokens.weight
    torch.testing.assert_close(_logits(model), expected, atol=2e-3, rtol=0)

    monkeypatch.setenv("MOEQ_KERNEL", "reference")
    torch.testing.assert_close(_logits(load_model(packed)), expected, atol=2e-5, rtol=0)


def test_generates_what_the_dequantized_model_does(packed: Path, dequantized: Any) -> None:
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    for beams in (1, 3):
        found, expected = (
            model.generate(**SOURCES, num_beams=beams, **options)
            for model in (load_model(packed, device_map="auto"), dequantized)
        )
        assert torch.equal(found, expected)


def test_saved_again_it_is_the_same(packed: Path, tmp_path: Path) -> None:
    model = load_model(packed, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again", max_shard_size="400KB")

    stored, expected = load(tmp_path / "again"), load(packed)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert check_manifest(tmp_path / "again") == []
    assert torch.equal(_logits(load_model(tmp_path / "again")), _logits(load_model(packed)))


def test_a_plain_copy_is_saved_under_the_names_of_transformers(
    packed: Path, dequantized: Any, tmp_path: Path
) -> None:
    plain = load_model(packed, quantization_config=MoeqConfig(dequantize=True))
    plain.save_pretrained(tmp_path / "plain")

    assert f"{LAST}.experts.expert_7.wo.weight" in load(tmp_path / "plain")
    again = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(_logits(again.eval()), _logits(dequantized), atol=1e-5, rtol=0)


def test_embeddings_apart_are_loaded(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = load(tiny_model(TINY))
    for number, name in enumerate(("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")):
        tensors[f"{name}.weight"] = tensors["shared.weight"].roll(number + 1, 0)
    folder = rewrite(tiny_model(TINY), tmp_path / "untied", tensors, tie_word_embeddings=False)
    output = pack_mixed(folder, tmp_path / "packed")
    expected = _logits(load_model(dequantize_checkpoint(output, tmp_path / "plain")))
    torch.testing.assert_close(_logits(load_model(output)), expected, atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{LAST}.experts.3.wo.weight_scale", "first w2.weight_scale of expert 3"),
        (f"{LAST}.router.classifier.weight", f"{LAST}.router.classifier.weight is missing"),
        ("shared.weight", "shared.weight is missing"),
    ],
)
def test_a_missing_tensor_is_named(name: str, message: str, packed: Path, tmp_path: Path) -> None:
    tensors = load(packed)
    del tensors[name]
    broken = rewrite(packed, tmp_path / "broken", tensors)
    (broken / "moeq_manifest.json").unlink()
    with pytest.raises(FormatError, match=message):
        load_model(broken)


def test_transformers_alone_refuses(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "moeq")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "moeq")
    with pytest.raises(ValueError, match=r"import vllm_moeq\.hf"):
        AutoModelForSeq2SeqLM.from_pretrained(packed)
