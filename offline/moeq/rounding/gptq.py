"""GPTQ: codes that keep the OUTPUT of a matrix, given what its inputs look like.

Minimizes tr(D H D^T) with D = quantized - original weights and H = X^T X of the inputs X:
Frantar et al., "GPTQ" (ICLR 2023), columns in the order of their input energy, on grids that are
fixed beforehand, so that no index is needed when the model runs. Two refinements follow, each of
which can only lower the same objective: codes one column at a time (coordinate descent, as in
Behdin et al., "QuantEase", 2023), and scales and zero points one group at a time.
"""

from typing import NamedTuple

import torch

from moeq.rounding.grid import Grid, QuantizedWeight, nearest_codes, storable

DAMPING, DAMPING_PER_COLUMN = 0.01, 0.5
"""Added to the diagonal of H, relative to its mean: at least the first, and more the fewer samples
there are for its columns. What a few samples say about K directions is mostly chance, and would be
fitted at the cost of all other inputs."""
_MOST_DAMPING = 1e3
_BLOCK = 128
"""Columns after which what lies to the right is updated, in one matrix product."""


class Refinement(NamedTuple):
    """How much is done after GPTQ itself.

    Attributes:
        rounds: Of both steps.
        scales: Whether scales and zero points are fitted, too.
    """

    rounds: int = 4
    scales: bool = True


REFINEMENT = Refinement()


def quantize_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    samples: int,
    bits: int,
    group_size: int,
    refinement: Refinement = REFINEMENT,
) -> QuantizedWeight:
    """Quantize a matrix so that its output on the calibration inputs changes least.

    Args:
        weight: [N, K], any floating type; K is a multiple of ``group_size``.
        hessian: Sum of the outer products of its inputs, float32 [K, K] on the same device.
        samples: How many inputs these are.
        bits: Width, one of the format's.
        group_size: Weights of a row that share a grid.
        refinement: What to do after GPTQ.

    Raises:
        ValueError: The weights are not finite, or too large for float16 scales; or the Hessian is
            not finite.
    """
    rows, columns = weight.shape
    weight = weight.float()
    damping = max(DAMPING, DAMPING_PER_COLUMN * columns / max(1, samples))
    hessian, factor = _damped(hessian.float(), damping)
    importance = hessian.diagonal().reshape(1, -1, group_size)
    grouped = weight.reshape(rows, -1, group_size)
    grid = Grid.searched(
        grouped.reshape(-1, group_size),
        bits,
        importance.expand_as(grouped).reshape(-1, group_size),
    )
    scale, zero = grid.scale.view(rows, -1), grid.zero.view(rows, -1)
    codes = _feed_back(weight, factor, scale, zero, bits)
    for _ in range(refinement.rounds):
        if refinement.scales:
            scale, zero = _fit_scales(weight, hessian, codes, scale, zero, bits)
        if not _descend(weight, hessian, codes, scale, zero, bits):
            break
    return QuantizedWeight.of(codes, scale, zero, bits)


def _damped(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, "_Factor"]:
    """Return H with that damping, or more if it needs more, and the factor of its inverse."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(hessian).all():
        raise ValueError("the calibration activations are NaN or infinite")
    if mean <= 0:  # no input at all: every column counts the same
        hessian, mean = torch.zeros_like(hessian), torch.ones_like(mean)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    while True:
        damped = hessian + damping * mean * torch.eye(len(hessian), device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if not failed.item():
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed.item():
            return damped, _Factor(order, upper)
        damping *= 10
        if damping > _MOST_DAMPING:
            raise ValueError(f"the Hessian is singular even with {_MOST_DAMPING:g} x damping")


class _Factor(NamedTuple):
    """Upper Cholesky factor of the inverse Hessian, its columns in the order of work."""

    order: torch.Tensor
    upper: torch.Tensor


def _feed_back(
    weight: torch.Tensor, factor: _Factor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Choose codes column by column; what is not chosen yet makes up for the error so far.

    Returns:
        Codes as float32 [N, K].
    """
    order, upper = factor
    remaining = weight[:, order]
    groups = order // (weight.shape[1] // scale.shape[1])
    codes = torch.empty_like(weight)
    for first in range(0, len(order), _BLOCK):
        last = min(first + _BLOCK, len(order))
        block = remaining[:, first:last].clone()
        errors = torch.empty_like(block)
        local = upper[first:last, first:last]
        for i in range(last - first):
            column = block[:, i]
            step, origin = scale[:, groups[first + i]], zero[:, groups[first + i]]
            code = nearest_codes(column, step, origin, bits)
            codes[:, order[first + i]] = code
            errors[:, i] = (column - (code - origin) * step) / local[i, i]
            block[:, i + 1 :] -= errors[:, i : i + 1] * local[i, i + 1 :]
        remaining[:, last:] -= errors @ upper[first:last, last:]
    return codes


def _descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
) -> bool:
    """Give each column in turn the best codes while all others stay; say whether any changed.

    Changes ``codes`` in place.
    """
    columns = weight.shape[1]
    group_size = columns // scale.shape[1]
    difference = _dequantize(codes, scale, zero) - weight
    changed = False
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        local = hessian[first:last, first:last]
        gradient = difference @ hessian[:, first:last]
        for i in range(last - first):
            place = first + i
            step, origin = scale[:, place // group_size], zero[:, place // group_size]
            wanted = weight[:, place] + difference[:, place] - gradient[:, i] / local[i, i]
            code = nearest_codes(wanted, step, origin, bits)
            change = (code - codes[:, place]) * step
            changed = changed or bool(change.any())
            codes[:, place] = code
            difference[:, place] += change
            gradient[:, i:] += change[:, None] * local[i, i:]
    return changed


def _fit_scales(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit each group's scale and zero point to its codes while all others stay.

    What the format can store is taken only where it lowers the objective.
    """
    groups = scale.shape[1]
    group_size = weight.shape[1] // groups
    scale, zero = scale.clone(), zero.clone()
    difference = _dequantize(codes, scale, zero) - weight
    for group in range(groups):
        part = slice(group * group_size, (group + 1) * group_size)
        local, code = hessian[part, part], codes[:, part]
        old = (code - zero[:, group, None]) * scale[:, group, None]
        # Of the difference without this group's quantized weights, in this group's columns.
        gradient = difference @ hessian[:, part] - old @ local
        # Minimize over quantized = s * code + l: two equations for each row.
        code_h = code @ local
        one_h = local.sum(0)
        a, b, c = (code_h * code).sum(1), code_h.sum(1), one_h.sum()
        p, q = -(gradient * code).sum(1), -gradient.sum(1)
        determinant = a * c - b * b
        solvable = determinant > 1e-6 * a * c
        determinant = torch.where(solvable, determinant, torch.ones_like(determinant))
        new_scale, low = (p * c - q * b) / determinant, (q * a - p * b) / determinant
        solvable &= new_scale > 0
        new_scale, new_zero = storable(new_scale, low, bits)
        new = (code - new_zero[:, None]) * new_scale[:, None]
        change = new - old
        gain = 2 * ((gradient + old @ local) * change).sum(1) + (change @ local * change).sum(1)
        better = solvable & (gain < 0)
        scale[:, group] = torch.where(better, new_scale, scale[:, group])
        zero[:, group] = torch.where(better, new_zero, zero[:, group])
        difference[:, part] += torch.where(better[:, None], change, torch.zeros_like(change))
    return scale, zero


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    grouped = codes.view(*scale.shape, -1)
    return ((grouped - zero[..., None]) * scale[..., None]).view_as(codes)
