"""What GPTQ does column after column: in C++ on a CPU, in Triton on a GPU, else in torch.

In torch each column is a few operations.

Matrices are transposed, [B, K, N], so that a column is contiguous; all are float32, and blocks of
columns have their grids column by column. Rows do not depend on each other, nor on the number of
threads.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch

from moeq.rounding.grid import largest_code, nearest_codes
from vllm_moeq.kernels import cpu, triton
from vllm_moeq.kernels.cpu import library

logger = logging.getLogger(__name__)

BLOCK = 128
"""Columns after which what lies to the right is updated, in one matrix product."""

DescendBlock = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int],
    tuple[torch.Tensor, torch.Tensor],
]
"""Takes a block's own part of H, its gradient, scales, codes and the largest code; returns codes
and the changes of the quantized weights."""


def round_columns(
    factor: torch.Tensor,
    wanted: torch.Tensor,
    sums: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose codes column by column: each makes up for the errors of the columns before it.

    With an upper factor R of the Hessian, R R^T, and differences d = quantized - wanted, the
    objective is |d R|^2; column j of d R has only d_0 to d_j, and d_j is chosen last of them.

    Args:
        factor: The block's own part of R [B, k, k].
        wanted: Weights [B, k, N].
        sums: What the differences of earlier blocks contribute to d R: [B, k, N].
        scale: [B, k, N].
        zero: In codes, [B, k, N].
        bits: Width of the codes.

    Returns:
        Codes and differences, [B, k, N].
    """
    if in_triton(wanted.device):
        from vllm_moeq.kernels.triton import columns  # Triton takes long to import

        return columns.round_columns(factor, wanted, sums, scale, zero, largest_code(bits))
    if not compiled(wanted):
        return round_columns_torch(factor, wanted, sums, scale, zero, bits)
    codes, difference = torch.empty_like(wanted), torch.empty_like(wanted)
    for parts in zip(factor, wanted, sums, scale, zero, codes, difference, strict=True):
        given = [part.contiguous() for part in parts[:-2]]
        addresses = [part.data_ptr() for part in (*given, *parts[-2:])]
        library.load().moeq_round_columns(*wanted.shape[1:], largest_code(bits), *addresses)
    return codes, difference


def descend(
    hessian: torch.Tensor,
    scale: torch.Tensor,
    codes: torch.Tensor,
    gradient: torch.Tensor,
    bits: int,
) -> None:
    """Lower d H d^T code by code, where each is set to what is best while all others stay.

    Args:
        hessian: The block's own part of H [B, k, k].
        scale: [B, k, N].
        codes: [B, k, N], changed in place; each of the matrices is contiguous.
        gradient: d H in the columns of the block, of the same form, changed in place.
        bits: Width of the codes.
    """
    if in_triton(codes.device):
        from vllm_moeq.kernels.triton import columns  # Triton takes long to import

        in_blocks(columns.descend, hessian, scale, codes, gradient, bits)
        return
    if not compiled(codes):
        descend_torch(hessian, scale, codes, gradient, bits)
        return
    for local, steps, chosen, slope in zip(hessian, scale, codes, gradient, strict=True):
        given = local.contiguous(), local.diagonal().contiguous(), steps.contiguous()
        addresses = [part.data_ptr() for part in (*given, chosen, slope)]
        library.load().moeq_descend(*codes.shape[1:], largest_code(bits), *addresses)


def compiled(tensor: torch.Tensor) -> bool:
    """Tell whether the loops over a tensor run in C++."""
    return cpu.unavailable(tensor.device) is None


@cache
def in_triton(device: torch.device) -> bool:
    """Tell whether the loops over tensors there run in Triton; tries it.

    Its older releases need a C compiler when they run.
    """
    if triton.unavailable(device) is not None:
        return False
    from vllm_moeq.kernels.triton import columns

    one = torch.ones(1, 1, 1, device=device)
    try:
        columns.round_columns(one, one, one, one, one, 1)
    except Exception as error:  # whatever it lacks, torch does the same
        logger.warning("GPTQ runs slowly on %s, without Triton: %s", device, error)
        return False
    return True


def round_columns_torch(
    factor: torch.Tensor,
    wanted: torch.Tensor,
    sums: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what :func:`round_columns` does, on any device."""
    codes, difference = torch.empty_like(wanted), torch.empty_like(wanted)
    sums, local = sums.clone(), factor[..., None]
    for i in range(wanted.shape[1]):
        step, origin = scale[:, i], zero[:, i]
        code = nearest_codes(wanted[:, i] - sums[:, i] / local[:, i, i], step, origin, bits)
        codes[:, i] = code
        difference[:, i] = (code - origin) * step - wanted[:, i]
        sums[:, i + 1 :].addcmul_(local[:, i, i + 1 :], difference[:, i : i + 1])
    return codes, difference


def descend_torch(
    hessian: torch.Tensor,
    scale: torch.Tensor,
    codes: torch.Tensor,
    gradient: torch.Tensor,
    bits: int,
) -> None:
    """Do what :func:`descend` does, on any device."""
    in_blocks(_descend_block, hessian, scale, codes, gradient, bits)


def in_blocks(
    descend_block: DescendBlock,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    codes: torch.Tensor,
    gradient: torch.Tensor,
    bits: int,
) -> None:
    """Do what :func:`descend` does, by what does it for at most BLOCK columns."""
    columns = codes.shape[1]
    for first in range(0, columns, BLOCK):
        part = slice(first, min(first + BLOCK, columns))
        codes[:, part], change = descend_block(
            hessian[:, part, part], gradient[:, part], scale[:, part], codes[:, part],
            largest_code(bits),
        )  # fmt: skip
        gradient.baddbmm_(hessian[:, part].mT, change)


def _descend_block(
    hessian: torch.Tensor,
    gradient: torch.Tensor,
    scale: torch.Tensor,
    codes: torch.Tensor,
    largest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes of at most BLOCK columns, and how much the quantized weights have changed."""
    near, chosen, change = gradient.clone(), codes.clone(), torch.empty_like(gradient)
    local = hessian[..., None]
    for i in range(near.shape[1]):
        step = scale[:, i]
        code = chosen[:, i] - near[:, i] / (local[:, i, i] * step)
        code = code.round_().clamp_(0, largest)
        change[:, i] = (code - chosen[:, i]) * step
        chosen[:, i] = code
        near[:, i:].addcmul_(local[:, i, i:], change[:, i : i + 1])
    return chosen, change
