"""What the method of an MoE layer refuses that no engine on a CPU can ask for."""

from dataclasses import replace

import pytest
import torch

from vllm_moeq.format import FormatError, LayerBits

pytestmark = pytest.mark.vllm


def test_expert_load_balancing_is_refused() -> None:
    # vLLM itself refuses it on a CPU, before it comes to the experts.
    from vllm.model_executor.layers.fused_moe import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    from vllm_moeq.moe_method import MoeqMoEMethod

    parallel = replace(FusedMoEParallelConfig.make_no_parallel(), enable_eplb=True)
    moe = FusedMoEConfig(
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
    with pytest.raises(FormatError, match="Start without --enable-eplb"):
        MoeqMoEMethod(moe, LayerBits((2, 3), (2, 3)), 32)
