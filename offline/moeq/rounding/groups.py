"""What rounding does group after group: in C++ on a CPU, else in torch, codes on a GPU in Triton.

Grids are searched before any code is chosen, and refined in turns with the codes afterwards. What
is refined is transposed, [B, K, N], all float32. Rows do not depend on each other, nor on the
number of threads.
"""

from collections.abc import Callable

import torch

from moeq.rounding.columns import compiled, descend, descend_torch
from moeq.rounding.grid import IMPOSSIBLE, Grid, in_groups, largest_code, search_shares, storable
from vllm_moeq.format import num_groups, spread, zero_point_unit
from vllm_moeq.kernels.cpu import library

Descent = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], None]
"""Takes H, scales, codes, their gradient and the width; changes codes and gradient."""


def search_grids(
    weights: torch.Tensor, importance: torch.Tensor, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the grids on which rounding to nearest errs least, as :meth:`Grid.searched` does.

    Args:
        weights: float32 [B, N, K].
        importance: Of the squared errors in each column, float32 [B, K].
        bits: Width.
        group_size: Weights of a row that share a grid; the last group may be shorter.

    Returns:
        Scales and zero points in codes, [B, groups, N].

    Raises:
        ValueError: The weights are not finite, or too large for float16 scales.
    """
    if not compiled(weights):
        return search_grids_torch(weights, importance, bits, group_size)
    batch, rows, columns = weights.shape
    scale, zero = weights.new_empty(2, batch, num_groups(columns, group_size), rows)
    shares = torch.tensor(search_shares(bits))
    for parts in zip(weights, importance, scale, zero, strict=True):
        given = [part.contiguous() for part in parts]
        possible = library.load().moeq_search_grids(
            rows, columns, group_size, largest_code(bits), zero_point_unit(bits),
            shares.data_ptr(), len(shares), *(part.data_ptr() for part in given),
        )  # fmt: skip
        if not possible:
            raise ValueError(IMPOSSIBLE)
    return scale, zero


def search_alone(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the grid of least squared error for each of groups that are rows of no matrix.

    Args:
        groups: float32 [n, G].
        bits: Width.

    Returns:
        Scales and zero points in codes, [n, 1].

    Raises:
        ValueError: As :func:`search_grids`.
    """
    size = groups.shape[1]
    scale, zero = search_grids(groups[None], groups.new_ones(1, size), bits, size)
    return scale.view(-1, 1), zero.view(-1, 1)


def refine_block(
    hessian: torch.Tensor,
    gradient: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group_size: int,
    sweeps: int,
) -> None:
    """Lower d H d^T by grids and codes of a block of columns in turns, while all others stay.

    Args:
        hessian: The block's own part of H [B, k, k].
        gradient: d H in the columns of the block [B, k, N]; its values are lost.
        codes: [B, k, N], changed in place; each of the matrices is contiguous, as those below.
        scale: [B, groups, N], changed in place.
        zero: In codes, [B, groups, N], changed in place.
        bits: Width of the codes.
        group_size: Columns of a group; the last may have fewer.
        sweeps: How often grids and codes have their turn.
    """
    if not compiled(codes):
        refine_block_torch(hessian, gradient, codes, scale, zero, bits, group_size, sweeps, descend)
        return
    for local, slope, chosen, steps, origins in zip(
        hessian, gradient, codes, scale, zero, strict=True
    ):
        given = local.contiguous(), local.diagonal().contiguous()
        addresses = [part.data_ptr() for part in (*given, chosen, slope, steps, origins)]
        library.load().moeq_refine(
            *chosen.shape, group_size, largest_code(bits), zero_point_unit(bits), sweeps,
            *addresses,
        )  # fmt: skip


def search_grids_torch(
    weights: torch.Tensor, importance: torch.Tensor, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what :func:`search_grids` does, on any device."""
    batch, rows, _ = weights.shape
    squares = importance[:, None].expand_as(weights)
    grids = [
        Grid.searched(groups, bits, counts)
        for groups, counts in zip(
            in_groups(weights, group_size), in_groups(squares, group_size), strict=True
        )
    ]
    scale, zero = (
        torch.cat([part.view(batch, rows, -1) for part in parts], 2).transpose(1, 2).contiguous()
        for parts in zip(*((grid.scale, grid.zero) for grid in grids), strict=True)
    )
    return scale, zero


def refine_block_torch(
    hessian: torch.Tensor,
    gradient: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group_size: int,
    sweeps: int,
    descent: Descent = descend_torch,
) -> None:
    """Do what :func:`refine_block` does, on any device, with a descent on the codes."""
    for _ in range(sweeps):
        _fit_grids(hessian, gradient, codes, scale, zero, bits, group_size)
        step = spread(scale, group_size, codes.shape[1])
        descent(hessian, step, codes, gradient, bits)


def _fit_grids(
    hessian: torch.Tensor,
    gradient: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group_size: int,
) -> None:
    """Fit the grids of a block, group after group, each while all others stay.

    Args:
        hessian: [B, k, k] of the block's columns.
        gradient: [B, k, N]: all differences times H, in the block's columns; kept up to date.
        codes: [B, k, N].
        scale: [B, groups, N], changed in place.
        zero: [B, groups, N], changed in place.
        bits: Width.
        group_size: Columns of a group; the last may have fewer.
    """
    for group in range(scale.shape[1]):
        part = slice(group * group_size, (group + 1) * group_size)
        change = _fit_grid(
            hessian[:, part, part],
            gradient[:, part],
            codes[:, part],
            scale[:, group],
            zero[:, group],
            bits,
        )
        gradient.baddbmm_(hessian[:, :, part], change)


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
    # Quantized weights are s * code + l: the objective is a quadratic form in changes of s and l.
    code_h = hessian @ codes
    a, b, c = (code_h * codes).sum(1), code_h.sum(1), hessian.sum((1, 2))[:, None]
    p, q = -(gradient * codes).sum(1), -gradient.sum(1)
    determinant = a * c - b * b
    solvable = determinant > 1e-6 * a * c
    determinant = torch.where(solvable, determinant, torch.ones_like(determinant))
    new_scale = scale + (p * c - q * b) / determinant
    low = (q * a - p * b) / determinant - zero * scale
    solvable &= new_scale > 0
    new_scale, new_zero = storable(new_scale, low, bits)
    by, shift = new_scale - scale, zero * scale - new_zero * new_scale
    gain = by * (a * by + 2 * (b * shift - p)) + shift * (c * shift - 2 * q)
    better = solvable & (gain < 0)
    scale.copy_(torch.where(better, new_scale, scale))
    zero.copy_(torch.where(better, new_zero, zero))
    return codes * (by * better)[:, None] + (shift * better)[:, None]
