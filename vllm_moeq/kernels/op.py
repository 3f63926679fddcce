"""``torch.ops.moeq.fused_experts``: the one op that a compiled model calls."""

import torch

from vllm_moeq.kernels.dispatch import KERNELS
from vllm_moeq.kernels.layout import ExpertWeights

# One plain registration instead of torch.library.custom_op, whose wrapper costs several
# microseconds a call. The object owns the registration and must live as long as the process.
_LIBRARY = torch.library.Library("moeq", "FRAGMENT")
_LIBRARY.define(
    "fused_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] weights, "
    "Tensor? w13_bias, Tensor? w2_bias, Tensor layout, Tensor? expert_map, str activation, "
    "bool apply_router_weight_on_input) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _fused_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weights: list[torch.Tensor],
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    layout: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
    apply_router_weight_on_input: bool,
) -> torch.Tensor:
    return KERNELS[int(layout[0, 0])].run(
        x,
        topk_weights,
        topk_ids,
        ExpertWeights(*weights),
        w13_bias,
        w2_bias,
        layout,
        expert_map,
        activation,
        apply_router_weight_on_input,
    )


def _fused_experts_fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)  # contiguous, whatever the strides of x


_LIBRARY.impl("fused_experts", _fused_experts, "CPU")
_LIBRARY.impl("fused_experts", _fused_experts, "CUDA")
torch.library.register_fake("moeq::fused_experts", _fused_experts_fake, lib=_LIBRARY)

fused_experts = torch.ops.moeq.fused_experts
"""Mixed-bit fused experts; arguments as in :func:`vllm_moeq.kernels.reference.fused_experts`,
with the six tensors of ``ExpertWeights`` as a list and the layout as its int64 CPU tensor."""
