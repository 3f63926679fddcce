"""What one expert computes for its tokens: w13, an activation, w2."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from moeq.model.stored import ExpertMatrices

Activation = Callable[[torch.Tensor], torch.Tensor]
"""Takes what w13 gives, [n, 2I] or [n, I]; returns what w2 gets, [n, I]."""
_TOKENS_AT_ONCE = 512
"""On a CPU: what an expert computes in between stays in the cache."""


def activation_of(layer_experts: nn.Module) -> Activation:
    """Return the activation of a layer's experts in transformers, for rows in the order of w13."""
    experts: Any = layer_experts
    if isinstance(experts, nn.ModuleDict):  # Switch Transformers'
        return cast(Activation, experts["expert_0"].act)
    if not hasattr(experts, "_apply_gate"):  # Llama-4's

        def gated(output: torch.Tensor) -> torch.Tensor:
            gate, up = output.chunk(2, -1)
            return cast(torch.Tensor, experts.act_fn(gate) * up)

        return gated
    if not experts.has_gate:
        return cast(Activation, experts.act_fn)
    if experts.is_concatenated:
        return cast(Activation, experts._apply_gate)

    def alternating(output: torch.Tensor) -> torch.Tensor:
        gate, up = output.chunk(2, -1)
        return cast(torch.Tensor, experts._apply_gate(torch.stack([gate, up], -1).flatten(-2)))

    return alternating


def expert_hidden(
    matrices: ExpertMatrices, x: torch.Tensor, activation: Activation
) -> torch.Tensor:
    """Return what an expert's down projection gets.

    Args:
        matrices: Of the expert.
        x: float32 [n, hidden_size]: its tokens.
        activation: Between its projections.

    Returns:
        float32 [n, I].
    """

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        return activation(F.linear(tokens, matrices.w13, matrices.w13_bias))

    return _in_parts(hidden, x, matrices.w2.shape[1])


def expert_output(
    matrices: ExpertMatrices, x: torch.Tensor, activation: Activation
) -> torch.Tensor:
    """Return what an expert gives, [n, hidden_size]; arguments as of :func:`expert_hidden`."""

    def output(tokens: torch.Tensor) -> torch.Tensor:
        hidden = activation(F.linear(tokens, matrices.w13, matrices.w13_bias))
        return F.linear(hidden, matrices.w2, matrices.w2_bias)

    return _in_parts(output, x, matrices.w2.shape[0])


def _in_parts(
    work: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, columns: int
) -> torch.Tensor:
    """Do work on tokens x [n, K] that gives [n, columns], on a CPU for some of them at a time."""
    if x.device.type != "cpu" or len(x) <= _TOKENS_AT_ONCE:
        return work(x)
    result = x.new_empty(len(x), columns)
    for first in range(0, len(x), _TOKENS_AT_ONCE):
        part = slice(first, first + _TOKENS_AT_ONCE)
        result[part] = work(x[part])
    return result
