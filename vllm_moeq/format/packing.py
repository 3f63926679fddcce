"""Bit packing of quantized weights: the one reference that every kernel is tested against.

A weight matrix [N, K] at ``bits`` per weight is stored as three tensors:

* ``weight_packed`` uint8 [N, K * bits / 8], row-major, least significant bit first. Eight
  consecutive codes of a row take exactly ``bits`` bytes, so a group starts on a byte and tensor
  parallelism is a plain ``narrow`` of rows or of group-aligned columns.
* ``weight_scale`` float16 [N, groups]; the last group of a row may be shorter than the others.
* ``weight_zero_point`` uint8 [N, groups], a fraction of the code range in 1/256:
  ``weight = scale * (code - zero_point * 2 ** bits / 256)``.

At 8 bits that is the usual integer zero point, and every integer zero point of a narrower width
has a value too. The finer steps between let a narrow grid be symmetric around zero (at 1 bit:
-s/2 and +s/2); they fit into the same byte and lower the squared error, by 7 to 20 % at 2 bits
(``examples/benchmarks/RESULTS.md``, zero-point resolution).
"""

import sys

import torch

from vllm_moeq.format.errors import FormatError
from vllm_moeq.format.plan import WIDTHS

CODES_PER_WORD = 8
"""Codes that are packed together: eight codes of b bits are b whole bytes."""

# Eight bytes, one code each, are folded into a 64-bit word: lanes of 8 bits into lanes of 16, 32
# and 64. (bits of the lane pair's upper half before folding, lane width) for codes of <= 4 bits.
_LANE_PAIRS = ((0x0F000F000F000F00, 8), (0x00FF000000FF0000, 16), (0x0000FFFF00000000, 32))


def packed_columns(columns: int, bits: int) -> int:
    """Return the bytes that one row of ``columns`` codes takes.

    Raises:
        FormatError: ``bits`` is no width of the format or ``columns`` is not a multiple of 8.
    """
    if bits not in WIDTHS:
        raise FormatError(f"width {bits} is not one of {list(WIDTHS)}")
    if columns % CODES_PER_WORD:
        raise FormatError(f"a row of {columns} weights is not a multiple of {CODES_PER_WORD}")
    return columns * bits // 8


def num_groups(columns: int, group_size: int) -> int:
    """Return the groups of a row of ``columns`` weights, of which the last may be short."""
    return -(-columns // group_size)


def zero_point_unit(bits: int) -> float:
    """Return the codes that one unit of a stored zero point stands for."""
    return float(2**bits / 256)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes uint8 [N, K], each below ``2 ** bits``, into uint8 [N, K * bits / 8]."""
    rows, columns = codes.shape
    packed_columns(columns, bits)
    if codes.dtype != torch.uint8:
        raise FormatError(f"codes must be uint8, not {codes.dtype}")
    if bits == 8:
        return codes.contiguous().clone()
    _require_little_endian()
    word = codes.contiguous().clone().view(torch.int64)
    for upper, lane in _LANE_PAIRS:
        # Unused bits of a lane are zero, so the upper lane can slide down onto them.
        moved = (word & upper) >> (lane - lane // 8 * bits)
        word &= ~upper
        word |= moved
    used = word.view(torch.uint8).view(rows, -1, CODES_PER_WORD)[..., :bits]
    return used.reshape(rows, -1).contiguous()  # reshape may return a strided view of one byte


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack uint8 [N, K * bits / 8] into codes uint8 [N, K]; the inverse of :func:`pack`."""
    if bits not in WIDTHS:
        raise FormatError(f"width {bits} is not one of {list(WIDTHS)}")
    if bits == 8:
        return packed.clone()
    _require_little_endian()
    rows = packed.shape[0]
    padded = packed.new_zeros(rows, packed.shape[1] // bits, CODES_PER_WORD)
    padded[..., :bits] = packed.view(rows, -1, bits)
    word = padded.view(torch.int64)
    for upper, lane in reversed(_LANE_PAIRS):
        used = lane // 8 * bits
        ones = (1 << used) - 1
        lower = sum(ones << start for start in range(0, 64, 2 * lane))
        word = (word & lower) | ((word << (lane - used)) & upper & (lower << lane))
    return word.view(torch.uint8).view(rows, -1)


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the weights [N, K] in ``dtype``; computed exactly in float32 before the cast.

    Args:
        packed: uint8 [N, K * bits / 8].
        scale: float16 [N, groups].
        zero_point: uint8 [N, groups], in units of :func:`zero_point_unit`.
        bits: Width of a code.
        group_size: Weights of a row that share a scale; the last group may be shorter.
        dtype: Type of the result.

    Raises:
        FormatError: There are more or fewer groups than a row has.
    """
    codes = unpack(packed, bits).to(torch.float32)
    rows, columns = codes.shape
    if scale.shape[1] != num_groups(columns, group_size):
        raise FormatError(
            f"{scale.shape[1]} scales of a row do not fit {columns} weights in groups of "
            f"{group_size}"
        )
    zero = zero_point.to(torch.float32) * zero_point_unit(bits)
    # float32 holds the product of an 11-bit scale and a 9-bit difference exactly.
    codes -= spread(zero, group_size, columns)
    codes *= spread(scale.to(torch.float32), group_size, columns)
    return codes.to(dtype)


def spread(values: torch.Tensor, group_size: int, columns: int) -> torch.Tensor:
    """Return what groups have [N, groups] as what their weights have [N, columns]."""
    return values.repeat_interleave(group_size, 1)[:, :columns]


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise FormatError("packing needs a little-endian machine")
