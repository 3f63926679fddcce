"""Every family: vLLM on the packed checkpoint against transformers on the dequantized one.

Dense layers are packed too, but for layers that draft tokens.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.engine import (
    LOGPROB_TOLERANCE,
    TWO_RANKS,
    assert_likely,
    assert_same,
    run_engine,
    run_transformers,
    run_two_engines,
    text_logits,
)
from support.linear import pack_linear
from support.models import (
    BFLOAT16_IN_VLLM,
    DIFFERENT_IN_VLLM,
    FAMILIES,
    NEED_TORCHVISION,
    NOT_ON_CPU,
    add_prediction_layer,
)
from support.packed import pack_mixed
from support.prediction import predicting, with_prediction
from support.reference import dequantize_checkpoint
from support.sources import load, rewrite

WITH_PREDICTION_LAYER = "deepseek_v3 with a prediction layer"

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


WITHOUT_OWN_ROTARY_OP = ("deepseek", "glm4_moe_lite", "kimi_k2", "lfm2_moe")
SERVED = FAMILIES.keys() - NOT_ON_CPU.keys() - DIFFERENT_IN_VLLM - BFLOAT16_IN_VLLM
ON_TWO_RANKS = {"qwen2_moe": 64, "granitemoe": 32, "gpt_oss": 32, "llama4_text": 32}
"""One family of each layout on disk, with a group size: a tensor per expert, fused, fused with
biases and rows that alternate, and fused and transposed with router weights on the input. Of the
176 columns of Qwen2-MoE the first rank takes two whole groups, the second a short one. Mixtral's
ranks are in ``test_engine.py``."""


def _tolerance(family: str) -> float:
    # Granite's multipliers make more of the rounding of activations.
    return 3e-3 if family.startswith("granite") else LOGPROB_TOLERANCE


def _options(family: str) -> dict[str, Any]:
    if family in NEED_TORCHVISION:
        pytest.importorskip("torchvision")
    options: dict[str, Any] = {}
    if "text_config" in FAMILIES[family]:
        options["language_model_only"] = True  # images are in test_vision.py
    if family in BFLOAT16_IN_VLLM:
        options["dtype"] = "bfloat16"
    if family.startswith(WITHOUT_OWN_ROTARY_OP):
        # vLLM 0.32's own CPU rotary op is wrong for latent attention and LFM2, quantized or not. It
        # is used in eager mode only, and its torch twin agrees with transformers.
        options["compilation_config"] = {"custom_ops": ["none"]}
    return options


@pytest.mark.parametrize("family", sorted(DIFFERENT_IN_VLLM))
def test_equals_the_dequantized_model_in_vllm(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    packed = pack_linear(pack_mixed(tiny_model(family), tmp_path / "packed"))
    plain = dequantize_checkpoint(packed, tmp_path / "plain")

    run, expected = (run_engine(folder) for folder in (packed, plain))

    assert_same(run.completions[0], expected.completions[0])


@pytest.mark.parametrize("family", sorted(BFLOAT16_IN_VLLM))
def test_is_the_dequantized_model_in_bfloat16(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    options = _options(family)
    packed = pack_linear(pack_mixed(tiny_model(family), tmp_path / "packed"))
    plain = dequantize_checkpoint(packed, tmp_path / "plain")

    run = run_engine(packed, **options)

    assert_likely(run.completions[0], text_logits(plain))


def test_answers_of_a_model_with_two_experts_mixed_up_are_not_likely(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("qwen3_next")
    right = load(model)
    other = {"0": "1", "1": "0"}
    mixed_up = {
        re.sub(r"(?<=experts\.)[01](?=\.down_proj)", lambda expert: other[expert[0]], name): tensor
        for name, tensor in right.items()
    }
    assert mixed_up.keys() == right.keys()
    answers = run_transformers(rewrite(model, tmp_path / "mixed up", mixed_up))

    assert_likely(run_transformers(model), text_logits(model))
    with pytest.raises(AssertionError):
        assert_likely(answers, text_logits(model))


@pytest.mark.parametrize("family", [*sorted(SERVED), WITH_PREDICTION_LAYER])
def test_equals_the_dequantized_model(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    options = _options(family.split()[0])
    model = tiny_model(family.split()[0])
    if family == WITH_PREDICTION_LAYER:
        model = add_prediction_layer(model, tmp_path / "model", "model.layers.2.")
    packed = pack_linear(pack_mixed(model, tmp_path / "packed"))
    plain = dequantize_checkpoint(packed, tmp_path / "plain")

    run = run_engine(packed, **options)

    # One token of Gemma-4's has two experts that are equally good to 1e-6: rounding decides.
    ties = int(family == "gemma4_text")
    assert_same(run.completions[0], run_transformers(plain), _tolerance(family), ties)


def _assert_two_ranks_equal_the_dequantized_model(
    family: str, model: Path, folder: Path, **more: Any
) -> None:
    packed = pack_linear(pack_mixed(model, folder / "packed", ON_TWO_RANKS[family]))
    plain = dequantize_checkpoint(packed, folder / "plain")

    run = run_engine(packed, **TWO_RANKS, **more)

    assert_same(run.completions[0], run_transformers(plain), _tolerance(family))


@pytest.mark.parametrize("family", ON_TWO_RANKS)
def test_two_ranks_split_each_expert(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    _assert_two_ranks_equal_the_dequantized_model(family, tiny_model(family), tmp_path)


@pytest.mark.parametrize("family", ON_TWO_RANKS)
def test_two_ranks_split_the_experts(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    _assert_two_ranks_equal_the_dequantized_model(
        family, tiny_model(family), tmp_path, enable_expert_parallel=True
    )


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "llama4_text"])
def test_two_engines_split_the_experts(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    packed = pack_linear(pack_mixed(tiny_model(family), tmp_path / "packed"))
    plain = dequantize_checkpoint(packed, tmp_path / "plain")

    runs = run_two_engines(packed, enable_expert_parallel=True)

    answers = [answer for run in runs for answer in run.completions[0]]
    assert_same(answers, run_transformers(plain), _tolerance(family))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "ernie4_5_moe"])
def test_a_prediction_layer_drafts_tokens_that_are_accepted(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, _ = with_prediction(tiny_model(family), tmp_path / "model", family)
    packed = pack_mixed(predicting(model), tmp_path / "packed")
    plain = dequantize_checkpoint(packed, tmp_path / "plain")

    run = run_engine(
        packed,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
        disable_log_stats=False,
        **_options(family),
    )

    if family in DIFFERENT_IN_VLLM:
        assert_same(run.completions[0], run_engine(packed, **_options(family)).completions[0])
    elif family in BFLOAT16_IN_VLLM:
        assert_likely(run.completions[0], text_logits(plain))
    else:
        assert_same(run.completions[0], run_transformers(plain))
    accepted = run.metrics["vllm:spec_decode_num_accepted_tokens"]
    drafted = run.metrics["vllm:spec_decode_num_draft_tokens"]
    assert accepted > 0.5 * drafted  # chance is one in the size of the vocabulary


def test_a_model_without_a_row_is_served(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    family = "granitemoehybrid"
    packed = pack_linear(pack_mixed(tiny_model(family), tmp_path / "packed"))
    plain = dequantize_checkpoint(packed, tmp_path / "plain")

    run = run_engine(packed)

    assert_same(run.completions[0], run_transformers(plain), _tolerance(family))
