"""Weights as the Triton kernel reads them: "b planes" of 16-bit words.

A matrix [N, K] of b-bit codes becomes int16 [K / 128, b, N, 8]. The b words at [kb, :, n, lane] are
one record: the 16 codes of row n at k = 128 * kb + 8 * h + lane, h from 0 to 15. A word holds
``16 // b`` whole codes, lowest bits first; codes that are left over lie in the spare top bits of
all words, so that no width wastes a bit. Loading eight lanes of a row is one 16-byte access, and
the codes of one thread are already where the tensor cores want them.

A code c becomes a number with a shift and one three-input logic instruction: its bits are set into
the mantissa of a constant, which gives ``offset + c``. The offset goes with the zero point.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vllm_moeq.format import unpack, zero_point_unit

BLOCK_K = 128
"""Columns of a record."""
CODES = 16
"""Codes of a record."""
LANES = BLOCK_K // CODES
OUTPUTS = CODES // 2
"""Codes of a record that are decoded at a time: registers do not hold all of them."""
BLOCK_N = 128
"""Rows are padded to a multiple of this, with weights of zero."""
ALIGNMENT = 128
"""Bytes; unit of the offsets of experts."""

_WORD_BITS = 16
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
_PAIR = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
_ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}  # the number 1
# 2 ** mantissa bits: its last mantissa bit counts 1.
_MAGIC = {torch.bfloat16: 0x4300, torch.float16: 0x6400}
_AND_OR, _AND_XOR = "0xea", "0x6a"  # (a & b) | c and (a & b) ^ c as tables of lop3


class Segment(NamedTuple):
    """Where some bits of a code are: in which word, from which bit, how many, from which of it."""

    word: int
    word_bit: int
    bits: int
    code_bit: int


@cache
def segments(bits: int) -> tuple[tuple[Segment, ...], ...]:
    """Return for each of the 16 codes of a record where its bits are."""
    whole = _WORD_BITS // bits
    places: list[tuple[Segment, ...]] = [
        (Segment(h // whole, bits * (h % whole), bits, 0),) for h in range(min(CODES, bits * whole))
    ]
    spare = [(word, bit) for word in range(bits) for bit in range(bits * whole, _WORD_BITS)]
    for first in range(0, len(spare), bits):
        code: list[Segment] = []
        for code_bit, (word, bit) in enumerate(spare[first : first + bits]):
            last = code[-1] if code else None
            if last and (last.word, last.word_bit + last.bits) == (word, bit):
                code[-1] = last._replace(bits=last.bits + 1)
            else:
                code.append(Segment(word, bit, 1, code_bit))
        places.append(tuple(code))
    return tuple(places)


def padded(size: int, multiple: int) -> int:
    """Return the next multiple."""
    return -(-size // multiple) * multiple


def matrix_words(rows: int, columns: int, bits: int) -> int:
    """Return the 16-bit words of one matrix."""
    return padded(rows, BLOCK_N) * padded(columns, BLOCK_K) // CODES * bits


def pack_planes(
    packed: torch.Tensor, bits: int, row_order: torch.Tensor, out: torch.Tensor
) -> None:
    """Bring one canonical matrix into planes.

    Args:
        packed: Canonical codes, uint8 [rows, K * bits / 8].
        bits: Their width.
        row_order: int64 [N]: which row comes where; ``rows`` stands for a row of zeros.
        out: int16 [matrix_words(N, K, bits)], on the same device.
    """
    codes = unpack(packed, bits)
    rows, columns = codes.shape
    blocks = padded(columns, BLOCK_K) // BLOCK_K
    codes = F.pad(codes, (0, blocks * BLOCK_K - columns, 0, 1))[row_order]
    records = codes.view(-1, blocks, CODES, LANES)
    planes = out.view(blocks, bits, -1, LANES).zero_()
    for h, places in enumerate(segments(bits)):
        code = records[:, :, h].transpose(0, 1).to(torch.int16)
        for word, word_bit, count, code_bit in places:
            planes[:, word] |= ((code >> code_bit) & ((1 << count) - 1)) << word_bit


def pack_scales(
    scale: torch.Tensor, zero_point: torch.Tensor, bits: int, row_order: torch.Tensor, groups: int
) -> torch.Tensor:
    """Return scales and zero points as int32 [groups, N]: float16 scale, float16 zero << 16.

    Args:
        scale: float16 [rows, K / group_size].
        zero_point: uint8 of the same shape, in units of ``zero_point_unit(bits)``; in codes it is
            a multiple of a power of two below 256, which float16 holds exactly.
        bits: Width of the codes.
        row_order: As in :func:`pack_planes`.
        groups: With those of padded columns, whose scale is zero.
    """
    zero = (zero_point.float() * zero_point_unit(bits)).half()
    pair = torch.stack((scale, zero), -1).view(torch.int32).squeeze(-1)  # little-endian
    pair = F.pad(pair, (0, groups - pair.shape[1], 0, 1))
    return pair[row_order].t().contiguous()


def code_offset(bits: int, dtype: torch.dtype) -> float:
    """Return what :func:`decode_assembly` adds to every code."""
    if _signed(bits, dtype):
        return -128.0
    return float(1 << _MANTISSA_BITS[dtype] >> _code_position(bits, dtype))


def decode_assembly(bits: int, dtype: torch.dtype, half: int, groups: int = 0) -> str:
    """Return PTX for one half of the columns of two records at once, in 8 outputs of two numbers.

    Inputs are the ``bits`` words of the records, outputs ``offset + code`` in ``dtype``. With
    ``groups`` in the half, shift, scale and rest of each are further inputs, and outputs are
    ``(offset + code + shift) * scale + rest``. That sum must be exact in ``dtype``.
    """
    code = _Assembly(bits, dtype)
    multiply_add = f"fma.rn.{_PAIR[dtype]}"  # sm_80 has no add of two bfloat16
    for h in range(OUTPUTS):
        number = code.number(half * OUTPUTS + h)
        if groups:
            first = OUTPUTS + bits + 3 * (h * groups // OUTPUTS)
            shift, scale, rest = (f"${first + place}" for place in range(3))
            whole = code.assign(multiply_add, number, code.one, shift)
            code.emit(multiply_add, f"${h}", whole, scale, rest)
        else:
            code.emit("mov.b32", f"${h}", number)
    return code.text()


def constraints(bits: int, groups: int) -> str:
    """Return the constraints of such PTX; outputs are written before all inputs are read."""
    return ",".join(["=&r"] * OUTPUTS + ["r"] * (bits + 3 * groups))


class _Assembly:
    """PTX that takes codes out of words, on registers of two halves."""

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        self._bits, self._dtype = bits, dtype
        self._position = _code_position(bits, dtype)
        self._magic = _twice(_MAGIC[dtype] - (self._position << _MANTISSA_BITS[dtype]))
        self._lines: list[str] = []
        self._registers = 0
        self.one = self.assign("mov.b32", _twice(_ONE[dtype]))

    def emit(self, instruction: str, *operands: str) -> None:
        self._lines.append(f"{instruction} {', '.join(operands)};")

    def assign(self, instruction: str, *operands: str) -> str:
        """Emit an instruction with a new register for its result, and return that."""
        self._registers += 1
        register = f"t{self._registers}"
        self.emit(instruction, register, *operands)
        return register

    def number(self, h: int) -> str:
        """Return a register with ``offset + code`` of the h-th codes of two records."""
        value = self._magic
        for word, word_bit, count, code_bit in segments(self._bits)[h]:
            shift = word_bit - code_bit - self._position
            source = f"${OUTPUTS + word}"
            if shift:
                instruction = "shr.b32" if shift > 0 else "shl.b32"
                source = self.assign(instruction, source, str(abs(shift)))
            if _signed(self._bits, self._dtype):
                # 8 bits do not fit into 7: (128 + low 7 bits) * 1 + (-256 or -128).
                low = self.assign("lop3.b32", source, _twice(0x7F), self._magic, _AND_OR)
                high = self.assign("lop3.b32", source, _twice(0x80), _twice(0xC380), _AND_XOR)
                value = self.assign("fma.rn.bf16x2", low, self.one, high)
            else:
                mask = _twice(((1 << count) - 1) << (code_bit + self._position))
                value = self.assign("lop3.b32", source, mask, value, _AND_OR)
        return value

    def text(self) -> str:
        names = ", ".join(f"t{i}" for i in range(1, self._registers + 1))
        return f"{{ .reg .b32 {names}; {' '.join(self._lines)} }}"


def _signed(bits: int, dtype: torch.dtype) -> bool:
    """Say whether codes have more bits than the mantissa."""
    return bits > _MANTISSA_BITS[dtype]


def _code_position(bits: int, dtype: torch.dtype) -> int:
    """Return the mantissa bit where a code starts: high, so that the offset is small.

    A multiple of the width: most codes of a word are there without a shift of their own.
    """
    if _signed(bits, dtype):
        return 0
    return (_MANTISSA_BITS[dtype] - bits) // bits * bits


def _twice(half: int) -> str:
    return hex(half << 16 | half)
