"""What the method of an MoE layer refuses that no engine on a CPU can ask for, or in a moment."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_moeq.format import FormatError, LayerBits

pytestmark = pytest.mark.vllm


def _config(enable_eplb: bool = False) -> Any:
    """Return vLLM's description of a layer with two experts of 64 x 64 weights."""
    from vllm.model_executor.layers.fused_moe import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    parallel = replace(FusedMoEParallelConfig.make_no_parallel(), enable_eplb=enable_eplb)
    return FusedMoEConfig(
        num_experts=2,
        experts_per_token=1,
        hidden_dim=64,
        intermediate_size=64,
        num_local_experts=2,
        num_logical_experts=2,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=parallel,
        in_dtype=torch.float32,
    )


def test_expert_load_balancing_is_refused() -> None:
    # vLLM itself refuses it on a CPU, before it comes to the experts.
    from vllm_moeq.moe_method import MoeqMoEMethod

    with pytest.raises(FormatError, match="Start without --enable-eplb"):
        MoeqMoEMethod(_config(enable_eplb=True), LayerBits((2, 3), (2, 3)), 32)


def test_a_group_that_does_not_divide_the_hidden_size_is_named() -> None:
    from vllm_moeq.moe_method import MoeqMoEMethod

    method = MoeqMoEMethod(_config(), LayerBits((2, 3), (2, 3)), 128)
    layer: Any = SimpleNamespace(layer_name="layer", activation=method.moe.activation)
    with pytest.raises(FormatError, match="layer: group size 128 does not divide hidden_size 64"):
        method.create_weights(layer, 2, 64, 64, torch.float32)
