"""Every family: vLLM on the packed checkpoint against transformers on the dequantized one.

Dense layers are packed too, but for layers that draft tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.engine import (
    LOGPROB_TOLERANCE,
    TWO_RANKS,
    assert_same,
    run_engine,
    run_transformers,
)
from support.linear import pack_linear
from support.models import DIFFERENT_IN_VLLM, FAMILIES, NOT_ON_CPU, add_prediction_layer
from support.packed import pack_mixed
from support.reference import dequantize_checkpoint

WITH_PREDICTION_LAYER = "deepseek_v3 with a prediction layer"

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


TOLERANCE = {"float32": LOGPROB_TOLERANCE, "bfloat16": 0.5}
WITH_LATENT_ATTENTION = ("deepseek", "glm4_moe_lite")
SERVED = FAMILIES.keys() - NOT_ON_CPU.keys() - DIFFERENT_IN_VLLM.keys()
ON_TWO_RANKS = {"qwen2_moe": 64, "granitemoe": 32, "gpt_oss": 32}
"""One family of each layout on disk, with a group size: a tensor per expert, fused, and fused with
biases and rows that alternate. Of the 176 columns of Qwen2-MoE the first rank takes two whole
groups, the second a short one. Mixtral's ranks are in ``test_engine.py``."""


def _tolerance(family: str) -> float:
    # Granite's multipliers make more of the rounding of activations.
    return 3e-3 if family.startswith("granite") else LOGPROB_TOLERANCE


@pytest.mark.parametrize(("family", "dtype"), DIFFERENT_IN_VLLM.items())
def test_equals_the_dequantized_model_in_vllm(
    family: str, dtype: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    packed = pack_mixed(tiny_model(family), tmp_path / "packed")
    if dtype == "float32":  # vLLM's bfloat16 layers are less exact than packed ones
        pack_linear(packed)
    plain = dequantize_checkpoint(packed, tmp_path / "plain")

    run, expected = (run_engine(folder, dtype=dtype) for folder in (packed, plain))

    assert_same(run.completions[0], expected.completions[0], TOLERANCE[dtype])


@pytest.mark.parametrize("family", [*sorted(SERVED), WITH_PREDICTION_LAYER])
def test_equals_the_dequantized_model(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model(family.split()[0])
    if family == WITH_PREDICTION_LAYER:
        model = add_prediction_layer(model, tmp_path / "model", "model.layers.2.")
    packed = pack_linear(pack_mixed(model, tmp_path / "packed"))
    plain = dequantize_checkpoint(packed, tmp_path / "plain")
    # vLLM 0.32's own CPU rotary op is wrong for latent attention, with or without quantization.
    # It is used in eager mode only, and its torch twin agrees with transformers.
    torch_ops = {"compilation_config": {"custom_ops": ["none"]}}

    run = run_engine(packed, **(torch_ops if family.startswith(WITH_LATENT_ATTENTION) else {}))

    assert_same(run.completions[0], run_transformers(plain), _tolerance(family))


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


@pytest.mark.parametrize(
    ("family", "prefix"), [("deepseek_v3", "model.layers.2."), ("qwen3_next", "mtp.layers.0.")]
)
def test_a_prediction_layer_drafts_tokens_that_are_accepted(
    family: str, prefix: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = add_prediction_layer(tiny_model(family), tmp_path / "model", prefix, predicts=True)
    packed = pack_mixed(model, tmp_path / "packed")
    plain = dequantize_checkpoint(packed, tmp_path / "plain")

    drafting = {
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 1},
        "disable_log_stats": False,
    }
    if family in DIFFERENT_IN_VLLM:
        dtype = DIFFERENT_IN_VLLM[family]
        run = run_engine(packed, dtype=dtype, **drafting)
        expected = run_engine(plain, dtype=dtype).completions[0]
    else:
        dtype = "float32"
        run = run_engine(packed, compilation_config={"custom_ops": ["none"]}, **drafting)
        expected = run_transformers(plain)

    assert_same(run.completions[0], expected, TOLERANCE[dtype])
    accepted = run.metrics["vllm:spec_decode_num_accepted_tokens"]
    drafted = run.metrics["vllm:spec_decode_num_draft_tokens"]
    assert accepted > 0.5 * drafted  # chance is one in the size of the vocabulary
