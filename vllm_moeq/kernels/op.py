"""``torch.ops.moeq.fused_experts``: the one op that a compiled model calls."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_moeq.kernels.call import FusedExpertsCall
from vllm_moeq.kernels.dispatch import KERNELS

# One plain registration instead of torch.library.custom_op, whose wrapper costs several
# microseconds a call. The object owns the registration and must live as long as the process.
_LIBRARY = torch.library.Library("moeq", "FRAGMENT")
_LIBRARY.define(
    "fused_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] weights, "
    "Tensor? w13_bias, Tensor? w2_bias, Tensor layout, Tensor? expert_map, str activation, "
    "bool apply_router_weight_on_input, float? swiglu_limit=None, float? swiglu_alpha=None, "
    "float? swiglu_beta=None) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _fused_experts(*arguments: Any) -> torch.Tensor:
    call = FusedExpertsCall.from_op(*arguments)
    return KERNELS[call.layout.kernel].run(call)


def _fused_experts_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *_: object,
) -> torch.Tensor:
    # torch takes a real call with one meta tensor for a call on meta and would return memory that
    # nobody wrote. That is how a reload which failed half-way leaves a layer.
    if not x.is_meta and any(weight.is_meta for weight in weights):
        raise RuntimeError(
            "the experts have no weights: the last reload of weights failed before it came to "
            "them. Restart the engine"
        )
    return x.new_empty(x.shape)  # contiguous, whatever the strides of x


_LIBRARY.impl("fused_experts", _fused_experts, "CPU")
_LIBRARY.impl("fused_experts", _fused_experts, "CUDA")
torch.library.register_fake("moeq::fused_experts", _fused_experts_fake, lib=_LIBRARY)

fused_experts = torch.ops.moeq.fused_experts
"""Mixed-bit fused experts; arguments as in :meth:`vllm_moeq.kernels.call.FusedExpertsCall.from_op`,
with the six tensors of ``ExpertWeights`` as a list and the layout as its int64 CPU tensor."""
