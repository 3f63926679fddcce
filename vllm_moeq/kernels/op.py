"""The ops that a compiled model calls: ``torch.ops.moeq.fused_experts`` and ``….linear``."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_moeq.kernels.call import FusedExpertsCall
from vllm_moeq.kernels.dispatch import KERNELS
from vllm_moeq.kernels.linear import LinearCall

# One plain registration instead of torch.library.custom_op, whose wrapper costs several
# microseconds a call. The object owns the registration and must live as long as the process.
_LIBRARY = torch.library.Library("moeq", "FRAGMENT")
_FUSED_EXPERTS = (
    "(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] weights, Tensor? w13_bias, "
    "Tensor? w2_bias, Tensor layout, Tensor? expert_map, str activation, "
    "bool apply_router_weight_on_input, float? swiglu_limit=None, float? swiglu_alpha=None, "
    "float? swiglu_beta=None) -> Tensor"
)
# The outputs are a number, not a part of the layout: a fake call has no layout to read. They are
# the model's, whatever the plan.
_LINEAR = "(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor layout, {} rows) -> Tensor"


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
    _check_loaded(x, weights)
    return x.new_empty(x.shape)  # contiguous, whatever the strides of x


def _linear(*arguments: Any) -> torch.Tensor:
    call = LinearCall.from_op(*arguments)
    return KERNELS[call.layout.kernel].run_linear(call)


def _linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    layout: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    _check_loaded(x, (packed, scale))
    return x.new_empty((*x.shape[:-1], rows))


def _check_loaded(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    # torch takes a real call with one meta tensor for a call on meta and would return memory that
    # nobody wrote. That is how a reload which failed half-way leaves a layer.
    if not x.is_meta and any(weight.is_meta for weight in weights):
        raise RuntimeError(
            "the layer has no weights: the last reload of weights failed before it came to it. "
            "Restart the engine"
        )


for _name, _schema, _function, _fake in (
    ("fused_experts", _FUSED_EXPERTS, _fused_experts, _fused_experts_fake),
    ("linear", _LINEAR.format("SymInt"), _linear, _linear_fake),
):
    _LIBRARY.define(f"{_name}{_schema}", tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.register_fake(f"moeq::{_name}", _fake, lib=_LIBRARY)
    # For all devices. On the CPU an op in C++ may take over (cpu/torch_ops.py), which leaves to
    # Python what is not its own.
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    _LIBRARY.define(f"{_name}_in_python{_schema.replace('SymInt', 'int')}")
    _LIBRARY.impl(f"{_name}_in_python", _function, "CompositeExplicitAutograd")

fused_experts = torch.ops.moeq.fused_experts
"""Mixed-bit fused experts; arguments as in :meth:`vllm_moeq.kernels.call.FusedExpertsCall.from_op`,
with the six tensors of ``ExpertWeights`` as a list and the layout as its int64 CPU tensor."""

packed_linear = torch.ops.moeq.linear
"""A dense linear layer; arguments as in :meth:`vllm_moeq.kernels.linear.LinearCall.from_op`."""
