"""What GPTQ does column after column on a GPU, see ``moeq.rounding.columns``.

A program keeps a block of columns of some rows in its registers, so that no column costs a launch
or a way through memory. Only a program's own rows are in it: results do not depend on how rows are
cut.
"""
# Code for Triton's compiler: no annotations.
# ruff: noqa: D417
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

BLOCK = 128
"""Columns that a program can hold."""
ROWS = 32
"""Of a program, which is one warp: a thread has all columns of a row."""

CHANGING = ("columns", "rows", "largest")
"""Arguments that change from call to call: no variants of a kernel for special values."""


@triton.jit
def nearest(value, largest):
    """Round to the nearest code, ties to even: that is what adding 1.5 * 2^23 does."""
    return tl.minimum(tl.maximum(value, 0.0), largest) + 12582912.0 - 12582912.0


@triton.jit
def read_column(tile, index):
    """Return column ``index`` of a tile [BLOCK, ROWS]."""
    own = tl.arange(0, tile.shape[0]) == index
    return tl.sum(tl.where(own[:, None], tile, 0.0), axis=0)


@triton.jit
def load_tile(ptr, row, columns, rows, BLOCK: tl.constexpr):
    """Load [BLOCK, ROWS] of a matrix [columns, rows]."""
    column = tl.arange(0, BLOCK)[:, None]
    inside = (column < columns) & (row < rows)[None, :]
    return tl.load(ptr + column * rows + row[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=CHANGING)
def round_kernel(
    factor_ptr,
    wanted_ptr,
    sums_ptr,
    scale_ptr,
    zero_ptr,
    codes_ptr,
    difference_ptr,
    columns,
    rows,
    largest,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Choose codes; all but the factor [B, columns, columns] are [B, columns, rows]."""
    matrix = tl.program_id(1).to(tl.int64) * columns
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, BLOCK)
    sums = load_tile(sums_ptr + matrix * rows, row, columns, rows, BLOCK)
    for i in range(columns):
        factor = factor_ptr + (matrix + i) * columns
        place = (matrix + i) * rows + row
        wanted = tl.load(wanted_ptr + place, mask=inside, other=0.0)
        scale = tl.load(scale_ptr + place, mask=inside, other=1.0)
        zero = tl.load(zero_ptr + place, mask=inside, other=0.0)
        target = wanted - read_column(sums, i) / tl.load(factor + i)
        code = nearest(target / scale + zero, largest)
        difference = (code - zero) * scale - wanted
        tl.store(codes_ptr + place, code, mask=inside)
        tl.store(difference_ptr + place, difference, mask=inside)
        weights = tl.load(factor + column, mask=column < columns, other=0.0)
        sums += weights[:, None] * difference[None, :]


@triton.jit(do_not_specialize=CHANGING)
def descend_kernel(
    hessian_ptr,
    gradient_ptr,
    scale_ptr,
    codes_ptr,
    change_ptr,
    columns,
    rows,
    largest,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Set each code to what is best while all others stay.

    Args:
        hessian_ptr: [B, columns, columns].
        gradient_ptr: The differences times the Hessian [B, columns, rows]; it stays as it is.
        scale_ptr, codes_ptr: Of the same form; codes are changed.
        change_ptr: Output, of the same form: by how much quantized weights have changed.
    """
    matrix = tl.program_id(1).to(tl.int64) * columns
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, BLOCK)
    gradient = load_tile(gradient_ptr + matrix * rows, row, columns, rows, BLOCK)
    for i in range(columns):
        hessian = hessian_ptr + (matrix + i) * columns
        place = (matrix + i) * rows + row
        scale = tl.load(scale_ptr + place, mask=inside, other=1.0)
        before = tl.load(codes_ptr + place, mask=inside, other=0.0)
        slope = read_column(gradient, i)
        code = nearest(before - slope / (tl.load(hessian + i) * scale), largest)
        change = (code - before) * scale
        tl.store(codes_ptr + place, code, mask=inside)
        tl.store(change_ptr + place, change, mask=inside)
        weights = tl.load(hessian + column, mask=column < columns, other=0.0)
        gradient += weights[:, None] * change[None, :]


def round_columns(
    factor: torch.Tensor,
    wanted: torch.Tensor,
    sums: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    largest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose codes column by column, as ``moeq.rounding.columns.round_columns``.

    Args:
        factor: float32 [B, k, k], k at most BLOCK.
        wanted, sums, scale, zero: float32 [B, k, N].
        largest: Code.

    Returns:
        Codes and differences, [B, k, N].

    Raises:
        ValueError: More than BLOCK columns.
    """
    given = [part.contiguous() for part in (factor, wanted, sums, scale, zero)]
    made = [torch.empty_like(given[1]) for _ in range(2)]
    _launch(round_kernel, *given, *made, like=wanted, largest=largest)
    return made[0], made[1]


def descend(
    hessian: torch.Tensor,
    gradient: torch.Tensor,
    scale: torch.Tensor,
    codes: torch.Tensor,
    largest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower d H d^T over at most BLOCK columns, once.

    Args:
        hessian: float32 [B, k, k], k at most BLOCK.
        gradient, scale, codes: float32 [B, k, N].
        largest: Code.

    Returns:
        Codes, and the changes of the quantized weights, [B, k, N].

    Raises:
        ValueError: More than BLOCK columns.
    """
    given = [part.contiguous() for part in (hessian, gradient, scale)]
    chosen = codes.clone(memory_format=torch.contiguous_format)
    change = torch.empty_like(chosen)
    _launch(descend_kernel, *given, chosen, change, like=codes, largest=largest)
    return chosen, change


def _launch(kernel, *tensors, like, largest):
    batch, columns, rows = like.shape
    if columns > BLOCK:
        raise ValueError(f"{columns} columns do not fit into a program, which holds {BLOCK}")
    with torch.cuda.device_of(like):  # Triton launches on the current GPU
        kernel[(triton.cdiv(rows, ROWS), batch)](
            *tensors, columns, rows, float(largest), BLOCK=BLOCK, ROWS=ROWS, num_warps=1
        )
