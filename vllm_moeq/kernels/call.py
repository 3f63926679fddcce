"""One call of the fused experts, as every kernel takes it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_moeq.format import PROJECTIONS
from vllm_moeq.kernels.layout import ExpertLayout, ExpertWeights


class Routing(NamedTuple):
    """Which experts each token goes through, with M tokens.

    Attributes:
        topk_weights: Router weights [M, top_k].
        topk_ids: Global expert ids [M, top_k]; below zero is padding. Those that are no experts
            are refused on CPUs; devices leave them out, as vLLM's kernels do, for the host would
            have to wait to notice them.
        expert_map: Global expert id to local slot, -1 for an expert of another rank; None if all
            experts are local.
    """

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None


class Biases(NamedTuple):
    """Biases of the local experts, E of them: w13 [E, w13_rows] and w2 [E, hidden_size]."""

    w13: torch.Tensor | None
    w2: torch.Tensor | None


class SwiGlu(NamedTuple):
    """Parameters of ``(up + beta) * gate * sigmoid(alpha * gate)``.

    Attributes:
        limit: Largest gate, and largest absolute value of up.
        alpha: Slope of the sigmoid.
        beta: What is added to up.
    """

    limit: float
    alpha: float
    beta: float


SWIGLU = {"silu": SwiGlu(math.inf, 1.0, 0.0), "swigluoai": SwiGlu(7.0, 1.702, 1.0)}
"""Activations of this form, with what they are if a model does not say otherwise."""


class FusedExpertsCall(NamedTuple):
    """Arguments of the op, checked; made by :meth:`from_op`.

    Attributes:
        x: Tokens [M, hidden_size] of any floating type; the result has the same type and shape.
        routing: Experts of each token.
        weights: Those of the local experts, as the kernel's ``prepare`` returned them.
        biases: Of the local experts.
        layout: Sizes, widths and offsets of the canonical weights.
        layout_tensor: The same as int64 [2 + E, 4] on the CPU, for kernels that are not Python.
        activation: One of ``reference.ACTIVATIONS``.
        apply_router_weight_on_input: Scale the input of an expert instead of its output.
        swiglu: Parameters of the activation, if it is one of ``SWIGLU``.
    """

    x: torch.Tensor
    routing: Routing
    weights: ExpertWeights
    biases: Biases
    layout: ExpertLayout
    layout_tensor: torch.Tensor
    activation: str
    apply_router_weight_on_input: bool
    swiglu: SwiGlu | None

    @classmethod
    def from_op(
        cls,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        weights: Sequence[torch.Tensor],
        w13_bias: torch.Tensor | None,
        w2_bias: torch.Tensor | None,
        layout: torch.Tensor,
        expert_map: torch.Tensor | None,
        activation: str,
        apply_router_weight_on_input: bool,
        swiglu_limit: float | None = None,
        swiglu_alpha: float | None = None,
        swiglu_beta: float | None = None,
    ) -> "FusedExpertsCall":
        """Take the arguments in the order of the op's schema.

        Raises:
            ValueError: Sizes that do not belong together, or parameters of SwiGLU for another
                activation; says which. Kernels trust them.
        """
        call = cls(
            x,
            Routing(topk_weights, topk_ids, expert_map),
            ExpertWeights(*weights),
            Biases(w13_bias, w2_bias),
            ExpertLayout.from_tensor(layout),
            layout,
            activation,
            apply_router_weight_on_input,
            _swiglu(activation, swiglu_limit, swiglu_alpha, swiglu_beta),
        )
        call._check()
        return call

    def _check(self) -> None:
        x, layout, (router_weight, ids, _) = self.x, self.layout, self.routing
        # Its memory is read as it is.
        if self.layout_tensor.dtype != torch.int64 or not self.layout_tensor.is_contiguous():
            raise ValueError("the layout is no contiguous tensor of int64")
        if x.dim() != 2 or ids.dim() != 2:
            raise ValueError(
                f"tokens {list(x.shape)} and expert ids {list(ids.shape)}: no matrices"
            )
        if ids.shape != router_weight.shape or ids.shape[0] != x.shape[0]:
            raise ValueError(
                f"{len(x)} tokens with router weights {list(router_weight.shape)} and expert ids "
                f"{list(ids.shape)}"
            )
        if x.shape[-1] != layout.hidden_size:
            raise ValueError(
                f"tokens {list(x.shape)} do not fit the layout, whose hidden_size is "
                f"{layout.hidden_size}"
            )
        for projection, bias in zip(PROJECTIONS, self.biases, strict=True):
            if bias is None:
                continue
            expected = [len(layout.slots), layout.shape(projection)[0]]
            if list(bias.shape) != expected:
                raise ValueError(f"{projection}_bias is {list(bias.shape)}, expected {expected}")


def no_expert(call: FusedExpertsCall) -> ValueError:
    """Return the error of a call with an expert id, or an entry of the map, that is no expert."""
    _, ids, expert_map = call.routing
    mapped = "" if expert_map is None else f" and a map of {expert_map.numel()}"
    return ValueError(
        f"expert ids reach {int(ids.max())}, but there are only {len(call.layout.slots)} local "
        f"experts{mapped}"
    )


def _swiglu(activation: str, *parameters: float | None) -> SwiGlu | None:
    usual = SWIGLU.get(activation)
    if usual is None:
        if any(parameter is not None for parameter in parameters):
            raise ValueError(f"activation {activation!r} has no limit, alpha or beta")
        return None
    given = (value if own is None else own for own, value in zip(parameters, usual, strict=True))
    return SwiGlu(*given)
