"""The torch reference: slow, correct everywhere, the oracle of every other kernel."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from vllm_moeq.format import Projection, dequantize
from vllm_moeq.kernels.call import SWIGLU, FusedExpertsCall, SwiGlu, no_expert
from vllm_moeq.kernels.layout import ExpertLayout, ExpertWeights
from vllm_moeq.kernels.linear import SYMMETRIC_ZERO_POINT, LinearCall, LinearLayout, LinearWeight

_GATED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up: F.relu(gate) * up,
    "relu2": lambda gate, up: F.relu(gate).square() * up,
}
_UNGATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu_no_mul": F.silu,
    "gelu_no_mul": F.gelu,
    "gelu_tanh_no_mul": lambda hidden: F.gelu(hidden, approximate="tanh"),
    "relu_no_mul": F.relu,
    "relu2_no_mul": lambda hidden: F.relu(hidden).square(),
}
ACTIVATIONS = (*SWIGLU, *_GATED, *_UNGATED)
"""Activations by vLLM's names, or in their manner; ``_no_mul`` means that there is no gate."""


def activate(hidden: torch.Tensor, activation: str, swiglu: SwiGlu | None) -> torch.Tensor:
    """Apply a gated or plain activation to w13's output [tokens, rows].

    Gate and up are the halves of a row, except for ``swigluoai``, where they alternate. ``swiglu``
    holds the parameters of those in ``SWIGLU``.

    Raises:
        ValueError: Unknown activation.
    """
    if activation in _UNGATED:
        return _UNGATED[activation](hidden)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {list(ACTIVATIONS)}")
    if activation == "swigluoai":
        gate, up = hidden[..., ::2], hidden[..., 1::2]
    else:
        gate, up = hidden.chunk(2, dim=-1)
    if swiglu is None:
        return _GATED[activation](gate, up)
    gate, up = gate.clamp(max=swiglu.limit), up.clamp(-swiglu.limit, swiglu.limit)
    return (up + swiglu.beta) * gate * torch.sigmoid(swiglu.alpha * gate)


def run(call: FusedExpertsCall, compute_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Run each token through its experts and sum them by router weight.

    Args:
        call: With canonical weights.
        compute_dtype: Type of weights and sums inside; float64 makes the test oracle.

    Raises:
        ValueError: Unknown activation; on CPUs, an expert id that is no expert.
    """
    x, layout = call.x, call.layout
    topk_weights, topk_ids, expert_map = call.routing
    slots = topk_ids.long()
    if expert_map is not None:
        # Ids below zero are padding; an index that is no expert would be an error of the device.
        exists = (slots >= 0) & (slots < len(expert_map))
        local = expert_map.long()[slots.clamp(0, len(expert_map) - 1)]
        slots = torch.where(exists, local, torch.where(slots < 0, -1, len(layout.slots)))
    if not x.is_cuda and (slots >= len(layout.slots)).any():
        raise no_expert(call)
    output = torch.zeros(x.shape, dtype=compute_dtype, device=x.device)
    tokens = x.to(compute_dtype)
    for slot in range(len(layout.slots)):
        chosen = slots == slot
        # Not times `chosen`: a NaN of another expert would come in.
        router_weight = torch.where(chosen, topk_weights, 0).sum(-1, keepdim=True)
        router_weight = router_weight.to(compute_dtype)
        rows: torch.Tensor | slice = slice(None)
        if not x.is_cuda:
            # Choosing rows would wait for the device and break CUDA graphs; there, the experts
            # see all tokens and those that are not theirs have weight zero.
            rows = chosen.any(-1).nonzero().flatten()
            if rows.numel() == 0:
                continue
        router_weight = router_weight[rows]
        inputs = tokens[rows]
        if call.apply_router_weight_on_input:
            inputs = inputs * router_weight
        w13 = expert_weight(layout, call.weights, "w13", slot, compute_dtype)
        hidden = F.linear(inputs, w13, _bias(call.biases.w13, slot, compute_dtype))
        w2 = expert_weight(layout, call.weights, "w2", slot, compute_dtype)
        activated = activate(hidden, call.activation, call.swiglu)
        result = F.linear(activated, w2, _bias(call.biases.w2, slot, compute_dtype))
        if not call.apply_router_weight_on_input:
            result = result * router_weight
        # Nothing for tokens of other experts, whose zeroed input still meets the biases.
        output[rows] += torch.where(chosen.any(-1, keepdim=True)[rows], result, 0)
    return output.to(x.dtype)


def expert_weight(
    layout: ExpertLayout,
    weights: ExpertWeights,
    projection: Projection,
    slot: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return one expert's matrix [rows, columns], dequantized from canonical weights."""
    packed, scale, zero_point = weights[:3] if projection == "w13" else weights[3:]
    offset, size = layout.span(projection, slot)
    bits, _ = layout.bits_and_offset(projection, slot)
    rows, _ = layout.shape(projection)
    matrix = packed[offset : offset + size].view(rows, -1)
    return dequantize(matrix, scale[slot], zero_point[slot], bits, layout.group_size, dtype)


def run_linear(call: LinearCall, compute_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Run a dense layer: dequantize, then multiply.

    Args:
        call: With the canonical weight.
        compute_dtype: Type of weights and sums; None takes that of the tokens.
    """
    dtype = compute_dtype or call.x.dtype
    bias = None if call.bias is None else call.bias.to(dtype)
    return F.linear(call.x.to(dtype), linear_weight(call.weight, call.layout, dtype), bias).to(
        call.x.dtype
    )


def linear_weight(weight: LinearWeight, layout: LinearLayout, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [N, K] of a dense layer, dequantized from its canonical tensors."""
    middle = torch.full_like(weight.scale, SYMMETRIC_ZERO_POINT, dtype=torch.uint8)
    return dequantize(
        weight.packed.contiguous().view(torch.uint8),
        weight.scale,
        middle,
        layout.bits,
        layout.group_size,
        dtype,
    )


def look_up(weight: LinearWeight, bits: int, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of embeddings, dequantized: [..., K].

    Args:
        weight: Canonical: [V, K].
        bits: Width of a code.
        ids: Which rows [...].
        dtype: Of the result.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=ids.device)
    packed, scale = weight.packed[ids].unsqueeze(-1), weight.scale[ids].unsqueeze(-1)
    codes = ((packed >> shifts) & (2**bits - 1)).flatten(-2)
    centered = (codes - 2 ** (bits - 1)).float().unflatten(-1, (scale.shape[-2], -1))
    rows: torch.Tensor = (centered * scale).flatten(-2).to(dtype)
    return rows


def _bias(bias: torch.Tensor | None, slot: int, dtype: torch.dtype) -> torch.Tensor | None:
    return None if bias is None else bias[slot].to(dtype)
