"""What the method of an MoE layer refuses that no engine on a CPU can ask for, or in a moment."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_moeq.collectives import all_gather_rows, reduce_scatter_rows
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


def test_collectives_that_vllm_has_itself_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators.base_device_communicator import (
        DeviceCommunicatorBase,
    )
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.platforms import current_platform

    from vllm_moeq.compat import complete_cpu_communicator

    if not current_platform.is_cpu():
        pytest.skip("they are those of CPUs")

    def of_vllm(self: Any, input_: torch.Tensor, dim: int, sizes: list[int]) -> torch.Tensor:
        return input_

    missing = DeviceCommunicatorBase.reduce_scatterv
    monkeypatch.setattr(CpuCommunicator, "all_gatherv", of_vllm, raising=False)
    monkeypatch.setattr(CpuCommunicator, "reduce_scatterv", missing, raising=False)
    complete_cpu_communicator(all_gather_rows, reduce_scatter_rows)
    assert CpuCommunicator.all_gatherv is of_vllm
    assert CpuCommunicator.reduce_scatterv is not missing
    with pytest.raises(NotImplementedError, match="dim 1, .* only rows"):
        CpuCommunicator.reduce_scatterv(SimpleNamespace(), torch.zeros(2, 2), 1, [1, 1])
