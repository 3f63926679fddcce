"""The one rule how matrices of experts are rounded, given what they get."""

from collections.abc import Iterable

import torch

from moeq.rounding.gptq import Hessian, gram, quantize_gptq
from moeq.rounding.grid import QuantizedWeight
from moeq.rounding.hqq import quantize_hqq
from moeq.rounding.rtn import quantize_rtn
from moeq.rounding.target import fitted

DATA_FREE = {"rtn": quantize_rtn, "hqq": quantize_hqq}
"""Rounding methods without calibration: take a matrix, its width and the group size."""
METHODS = ("gptq", *DATA_FREE)
FEWEST_TOKENS = 32
"""An expert that gets fewer calibration tokens is rounded without them: so few say more about
themselves than about the expert."""


def quantize_by_inputs(
    matrices: list[torch.Tensor],
    inputs: list[torch.Tensor],
    router_weights: list[torch.Tensor],
    widths: Iterable[int],
    group_size: int,
    *,
    method: str = "gptq",
    fewest_tokens: int = FEWEST_TOKENS,
    wanted: list[torch.Tensor] | None = None,
) -> dict[int, list[QuantizedWeight]]:
    """Round a matrix of each of several experts, at each of several widths.

    An error counts as much as the router weight that it is multiplied with, squared. Where any
    expert gets fewer than ``fewest_tokens`` tokens, all are rounded without them, with HQQ.

    Args:
        matrices: float32 [N, K] each.
        inputs: What each gets, float32 [n, K]; n differs.
        router_weights: [n, 1] each.
        widths: Of the format's.
        group_size: Weights of a row that share a scale.
        method: One of :data:`METHODS`.
        fewest_tokens: See :data:`FEWEST_TOKENS`.
        wanted: What they are to give [n, N], times router weights: the matrices are first moved to
            what comes nearest, see :mod:`moeq.rounding.target`; None leaves them. Not used without
            calibration.

    Returns:
        Width to the rounded matrices, in their order.

    Raises:
        ValueError: Weights or inputs that are not finite, or too large for float16 scales.
    """
    counts = [len(x) for x in inputs]
    if method in DATA_FREE or min(counts) < fewest_tokens:
        quantize = DATA_FREE.get(method, quantize_hqq)
        return {
            bits: [quantize(matrix, bits, group_size) for matrix in matrices] for bits in widths
        }
    weighted = [x * weight for x, weight in zip(inputs, router_weights, strict=True)]
    hessian = Hessian.of(torch.stack([gram(x) for x in weighted]), counts)
    weights = torch.stack(matrices)
    if wanted is not None:
        weights = fitted(weights, hessian, wanted, weighted)
    del weighted
    return {bits: quantize_gptq(weights, hessian, bits, group_size) for bits in widths}
