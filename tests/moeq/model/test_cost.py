"""What the estimates read off a configuration."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeq.allocation import PlanOptions
from moeq.calibration import CalibrationConfig, calibration_cost
from moeq.checkpoint import SourceModel
from moeq.checkpoint.families import MoELayer, family_of
from moeq.errors import MoeqError
from moeq.model.cost import at_once, experts_of_a_token, tokens_of_experts
from moeq.planning import Measurement, measuring_cost
from support.checkpoints import NUM_EXPERTS, write_checkpoint
from vllm_moeq.format import BitPlan, LayerBits


@pytest.mark.parametrize(
    ("config", "top_k"),
    [
        ({"num_experts_per_tok": 3}, 3),
        ({"num_experts_per_token": 3}, 3),  # Kimi-Linear
        ({"moe_k": 3}, 3),  # ERNIE-4.5
        ({"moe_topk": 3}, 3),  # Hunyuan
        ({"moe_topk": [1, 2]}, 2),  # Hunyuan, for each layer
        ({"top_k_experts": 3}, 3),  # Gemma-4
        ({"text_config": {"num_experts_per_tok": 3}}, 3),  # inside a vision model
        ({"num_experts_per_tok": None, "top_k_experts": 3}, 3),
        ({}, NUM_EXPERTS),
    ],
)
def test_the_experts_of_a_token_are_known_by_all_their_names(
    config: dict[str, Any], top_k: int, tmp_path: Path
) -> None:
    source = SourceModel.open(write_checkpoint(tmp_path, **config))
    assert experts_of_a_token(source, source.layers[0]) == top_k


@pytest.mark.parametrize("value", [None, 0, "two", 2.5, [], [None]])
def test_what_is_no_number_of_experts_is_named(value: object, tmp_path: Path) -> None:
    source = SourceModel.open(write_checkpoint(tmp_path, moe_k=value))
    message = f"{source.folder}: config.json has moe_k {value!r}, no number of experts"
    with pytest.raises(MoeqError, match=re.escape(message)):
        experts_of_a_token(source, source.layers[0])


@pytest.mark.parametrize(
    ("hidden", "inner", "threads", "experts"),
    [
        (256, 512, 2, 2),  # tiny-mixtral
        (2048, 768, 64, 6),  # Qwen3-30B-A3B: 144 MB each, 10 cores each
        (2048, 1408, 2, 2),  # DeepSeek-V2-Lite
        (4096, 14336, 64, 1),  # Mixtral-8x7B, whose matrices keep all cores busy
    ],
)
def test_small_experts_are_worked_on_beside_each_other(
    hidden: int, inner: int, threads: int, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of({"model_type": "mixtral"})
    layer = MoELayer(0, "experts", "router", family, 8, hidden, inner)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert at_once([layer], torch.device("cpu")) == experts
    assert at_once([layer], torch.device("cuda")) == 1


def test_experts_beside_each_other_cannot_all_have_all_tokens() -> None:
    assert tokens_of_experts(1, 2, 8) == 1
    assert tokens_of_experts(8, 2, 8) == 2  # all experts have two for each token
    assert tokens_of_experts(3, 8, 8) == 3
    assert tokens_of_experts(1, 1, 1) == 1


@pytest.mark.parametrize("rounding", [False, True])
def test_the_experts_of_a_layer_are_shared_among_workers(
    rounding: bool, tiny_model: Callable[[str], Path]
) -> None:
    """The time of workers that each take so many of eight experts, and of what is done alone."""
    source, cpu = SourceModel.open(tiny_model("mixtral")), torch.device("cpu")
    tokens = torch.zeros(8, 64, dtype=torch.int64)
    bits = LayerBits((2,) * 8, (2,) * 8)
    plan = BitPlan(32, {layer.container: bits for layer in source.layers})
    options = PlanOptions(2.5, strategy="auto", group_size=32)
    if rounding:
        cost = calibration_cost(CalibrationConfig(source, plan, tokens))
    else:
        cost = measuring_cost(Measurement(source, options, tokens, "gptq", cpu))
    cost = cost._replace(at_once=1)
    seconds = {workers: cost.seconds(cpu, workers) for workers in (1, 2, 3, 4, 5, 7, 8, 99)}
    assert seconds[1] == cost.seconds(cpu)
    one_expert = (seconds[1] - seconds[2]) / 4
    alone = seconds[1] - 8 * one_expert
    assert one_expert > 0 and alone > 0
    for workers, turns in {3: 3, 4: 2, 5: 2, 7: 2, 8: 1, 99: 1}.items():
        assert seconds[workers] == pytest.approx(alone + turns * one_expert)
