"""What packed experts take in memory, against the buffers that serving allocates."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moeq.checkpoint import SourceModel
from moeq.checkpoint.sizes import plan_sizes, served_bytes
from vllm_moeq.expert_buffers import ExpertBuffers, Share
from vllm_moeq.format import BitPlan, LayerBits
from vllm_moeq.kernels import ExpertLayout

GROUP = 32


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", ["qwen2_moe", "nemotron_h"])
def test_served_bytes(tiny_model: Callable[[str], Path], family: str, ranks: int) -> None:
    source = SourceModel.open(tiny_model(family))
    bits = LayerBits((1, 2, 3, 4, 8, 3, 2, 1), (8, 4, 1, 3, 2, 1, 8, 4))
    plan = BitPlan(GROUP, {layer.container: bits for layer in source.layers})
    allocated = 0
    for layer in source.layers:
        for rank in range(ranks):
            share = Share.of_rank("layer", GROUP, layer.intermediate_size, rank, ranks)
            layout = ExpertLayout.build(
                w13_bits=list(bits.w13),
                w2_bits=list(bits.w2),
                group_size=GROUP,
                hidden_size=layer.hidden_size,
                intermediate_size=share.size,
                gated=layer.family.gate is not None,
            )
            buffers = ExpertBuffers("layer", layout, share).allocate()
            allocated += sum(buffer.nbytes for buffer in buffers.values())
    assert served_bytes(plan, source) == allocated

    odd = family == "qwen2_moe"  # 176 columns, served as 192
    assert (allocated > plan_sizes(plan, source).expert_bytes) == odd
