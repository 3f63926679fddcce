"""GPTQ: codes that keep the OUTPUT of a matrix, given what its inputs look like.

Minimizes tr(D H D^T) with D = quantized - original weights and H = X^T X of the inputs X:
Frantar et al., "GPTQ" (ICLR 2023), columns in the order of their input energy, on grids that are
fixed beforehand, so that no index is needed when the model runs. Rounds of refinement follow, which
can only lower the same objective: each group's scale and zero point, and its codes one column at
a time (coordinate descent, as in Behdin et al., "QuantEase", 2023).

Matrices of several experts are rounded at once. Inside this file they are transposed, [B, K, N]:
all work goes column by column, and a column should be contiguous.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moeq.rounding.grid import Grid, QuantizedWeight, nearest_codes, storable

DAMPING, DAMPING_PER_COLUMN = 0.01, 0.5
"""Added to the diagonal of H, relative to its mean: at least the first, and more the fewer samples
there are for its columns. What a few samples say about K directions is mostly chance, and would be
fitted at the cost of all other inputs."""
_MOST_DAMPING = 1e3
_BLOCK = 128
"""Columns after which what lies to the right is updated, in one matrix product; a multiple of
every group size."""
_FEWEST_CHANGES = 0.002
"""Share of the codes: a round of refinement that changes fewer is the last."""


class Refinement(NamedTuple):
    """How much is done after GPTQ itself.

    Attributes:
        rounds: At most.
        scales: Whether scales and zero points are fitted, too.
    """

    rounds: int = 4
    scales: bool = True


REFINEMENT = Refinement()


class Hessian(NamedTuple):
    """What a batch of matrices is rounded by: damped Hessians and the factors of their inverses.

    Attributes:
        damped: float32 [B, K, K].
        order: int64 [B, K]: columns by their input energy, most first.
        upper: float32 [B, K, K]: upper Cholesky factors of the inverses, columns in that order.
    """

    damped: torch.Tensor
    order: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, sums: torch.Tensor, samples: Sequence[int]) -> "Hessian":
        """Damp Hessians, in place, and factor them; those that need more damping get more.

        Args:
            sums: Of the outer products of inputs, float32 [B, K, K].
            samples: How many inputs each of them comes from.

        Raises:
            ValueError: A Hessian is not finite.
        """
        if not torch.isfinite(sums).all():
            raise ValueError("the calibration activations are NaN or infinite")
        upper = torch.empty_like(sums)
        orders = [_factor(*parts) for parts in zip(sums, upper, samples, strict=True)]
        return cls(sums, torch.stack(orders), upper)


def _factor(hessian: torch.Tensor, out: torch.Tensor, samples: int) -> torch.Tensor:
    """Damp one Hessian, write the factor of its inverse to ``out``, and return the order."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if mean <= 0:  # no input at all: every column counts the same
        hessian.zero_()
        mean = torch.ones_like(mean)
    order = diagonal.argsort(descending=True, stable=True)
    undamped = diagonal.clone()
    damping = max(DAMPING, DAMPING_PER_COLUMN * len(hessian) / max(1, samples))
    while True:
        diagonal.copy_(undamped + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(hessian[order[:, None], order])
        if not failed.item():
            # One name for all three: they are large, and only one should stay.
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
        if not failed.item():
            out.copy_(factor)
            return order
        damping *= 10
        if damping > _MOST_DAMPING:
            raise ValueError(f"the Hessian is singular even with {_MOST_DAMPING:g} x damping")


def quantize_gptq(
    weights: torch.Tensor,
    hessian: Hessian,
    bits: int,
    group_size: int,
    refinement: Refinement = REFINEMENT,
) -> list[QuantizedWeight]:
    """Quantize matrices so that their outputs on the calibration inputs change least.

    Args:
        weights: [B, N, K], any floating type; K is a multiple of ``group_size``.
        hessian: Of their inputs.
        bits: Width, one of the format's.
        group_size: Weights of a row that share a grid.
        refinement: What to do after GPTQ.

    Raises:
        ValueError: The weights are not finite, or too large for float16 scales.
    """
    weights = weights.float()
    batch, rows, columns = weights.shape
    groups = weights.reshape(-1, group_size)
    importance = hessian.damped.diagonal(dim1=1, dim2=2).view(batch, 1, -1, group_size)
    importance = importance.expand(batch, rows, -1, group_size).reshape(-1, group_size)
    grid = Grid.searched(groups, bits, importance)
    del importance
    scale, zero = (
        values.view(batch, rows, -1).transpose(1, 2).contiguous()
        for values in (grid.scale, grid.zero)
    )
    transposed = weights.transpose(1, 2).contiguous()
    codes = _feed_back(transposed, hessian, scale, zero, bits)
    if refinement.rounds:
        _refine(transposed, hessian.damped, codes, scale, zero, bits, refinement)
    return [QuantizedWeight.of(codes[i].T, scale[i].T, zero[i].T, bits) for i in range(batch)]


def _feed_back(
    weight: torch.Tensor, hessian: Hessian, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Choose codes column by column; what is not chosen yet makes up for the error so far.

    Returns:
        Codes as float32 [B, K, N].
    """
    _, order, upper = hessian
    columns, rows = weight.shape[1:]
    index = order[:, :, None].expand(-1, -1, rows)
    remaining = weight.gather(1, index)
    group = order // (columns // scale.shape[1])
    codes = torch.empty_like(weight)
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        block, chosen = remaining[:, first:last], codes[:, first:last]
        place = group[:, first:last, None].expand(-1, -1, rows)
        step, origin = (grid.gather(1, place) for grid in (scale, zero))
        errors = torch.empty_like(block)
        local = upper[:, first:last, first:last, None]
        for i in range(last - first):
            code = nearest_codes(block[:, i], step[:, i], origin[:, i], bits)
            chosen[:, i] = code
            errors[:, i] = (block[:, i] - (code - origin[:, i]) * step[:, i]) / local[:, i, i]
            block[:, i + 1 :].addcmul_(local[:, i, i + 1 :], errors[:, i : i + 1], value=-1)
        remaining[:, last:].baddbmm_(upper[:, first:last, last:].mT, errors, alpha=-1)
    return torch.empty_like(codes).scatter_(1, index, codes)


def _refine(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    refinement: Refinement,
) -> None:
    """Improve grids and codes in place, block by block, as long as many codes change."""
    columns = weight.shape[1]
    group_size = columns // scale.shape[1]
    difference = _dequantize(codes, scale, zero).sub_(weight)
    for _ in range(refinement.rounds):
        changes = torch.zeros((), dtype=torch.int64, device=codes.device)
        for first in range(0, columns, _BLOCK):
            block = slice(first, min(first + _BLOCK, columns))
            gradient = hessian[:, block] @ difference
            if refinement.scales:
                for start in range(first, block.stop, group_size):
                    part = slice(start, start + group_size)
                    change = _fit_grid(
                        hessian[:, part, part],
                        gradient[:, start - first : start - first + group_size],
                        codes[:, part],
                        scale[:, start // group_size],
                        zero[:, start // group_size],
                        bits,
                    )
                    difference[:, part] += change
                    gradient.baddbmm_(hessian[:, block, part], change)
            local = hessian[:, block, block, None]
            for i, place in enumerate(range(first, block.stop)):
                step, origin = scale[:, place // group_size], zero[:, place // group_size]
                wanted = weight[:, place] + difference[:, place] - gradient[:, i] / local[:, i, i]
                code = nearest_codes(wanted, step, origin, bits)
                change = code - codes[:, place]
                changes += change.count_nonzero()
                codes[:, place] = code
                change *= step
                difference[:, place] += change
                gradient[:, i:].addcmul_(local[:, i, i:], change[:, None])
        if changes < _FEWEST_CHANGES * codes.numel():
            break


def _fit_grid(
    hessian: torch.Tensor,
    gradient: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """Fit a group's scale and zero point to its codes while all others stay.

    What the format can store is taken only where it lowers the objective.

    Args:
        hessian: [B, G, G] of the group's columns.
        gradient: [B, G, N]: all differences times H, in the group's columns.
        codes: [B, G, N].
        scale: [B, N], changed in place.
        zero: [B, N], changed in place.
        bits: Width.

    Returns:
        The change of the group's dequantized weights [B, G, N].
    """
    old = (codes - zero[:, None]) * scale[:, None]
    # Of the differences without this group's quantized weights.
    others = gradient - hessian @ old
    # Minimize over quantized = s * code + l: two equations for each row.
    code_h = hessian @ codes
    a, b, c = (code_h * codes).sum(1), code_h.sum(1), hessian.sum((1, 2))[:, None]
    p, q = -(others * codes).sum(1), -others.sum(1)
    determinant = a * c - b * b
    solvable = determinant > 1e-6 * a * c
    determinant = torch.where(solvable, determinant, torch.ones_like(determinant))
    new_scale, low = (p * c - q * b) / determinant, (q * a - p * b) / determinant
    solvable &= new_scale > 0
    new_scale, new_zero = storable(new_scale, low, bits)
    change = (codes - new_zero[:, None]) * new_scale[:, None] - old
    gain = ((2 * gradient + hessian @ change) * change).sum(1)
    better = solvable & (gain < 0)
    scale.copy_(torch.where(better, new_scale, scale))
    zero.copy_(torch.where(better, new_zero, zero))
    return torch.where(better[:, None], change, torch.zeros_like(change))


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    batch, groups, rows = scale.shape
    grouped = codes.view(batch, groups, -1, rows)
    return ((grouped - zero[:, :, None]) * scale[:, :, None]).view_as(codes)
