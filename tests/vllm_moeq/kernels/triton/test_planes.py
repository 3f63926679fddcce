"""The layout of weights, and the assembly that decodes it, in an emulation of its instructions."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from support.experts import random_matrix
from vllm_moeq.format import WIDTHS, unpack
from vllm_moeq.kernels.triton.planes import (
    BLOCK_K,
    BLOCK_N,
    CODES,
    LANES,
    OUTPUTS,
    code_offset,
    decode_assembly,
    matrix_words,
    pack_planes,
    pack_scales,
)

DTYPES = (torch.bfloat16, torch.float16)


def _planes(bits: int, rows: int = 40, columns: int = 288) -> tuple[torch.Tensor, np.ndarray]:
    """Return canonical codes, and planes as bits [blocks, rows, lane, 16 * bits]."""
    packed, _, _ = random_matrix(rows, columns, bits, 32, seed=bits)
    order = torch.arange(BLOCK_N).clamp(max=rows)
    out = torch.full((matrix_words(rows, columns, bits),), -1, dtype=torch.int16)
    pack_planes(packed, bits, order, out)
    words = out.view(-1, bits, BLOCK_N, LANES).numpy().view(np.uint16)
    stream = (words[..., None] >> np.arange(16, dtype=np.uint16)) & 1  # [kb, word, n, lane, bit]
    return unpack(packed, bits), stream.transpose(0, 2, 3, 1, 4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_records_hold_the_bits_of_their_codes_and_no_others(bits: int) -> None:
    codes, stream = _planes(bits)
    rows, columns = codes.shape
    blocks = -(-columns // BLOCK_K)
    padded = np.zeros((BLOCK_N, blocks * BLOCK_K), np.int64)
    padded[:rows, :columns] = codes.numpy()
    assert stream.shape == (blocks, BLOCK_N, LANES, bits, 16)
    records = padded.reshape(BLOCK_N, blocks, CODES, LANES).transpose(1, 0, 3, 2)
    ones = sum(((records >> bit) & 1).sum(-1) for bit in range(bits))
    np.testing.assert_array_equal(stream.sum((-1, -2)), ones)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_assembly_decodes_what_was_packed(bits: int, dtype: torch.dtype) -> None:
    codes, stream = _planes(bits)
    rows, columns = codes.shape
    halves = (decode_assembly(bits, dtype, half) for half in (0, 1))
    outputs = [
        output for assembly in halves for output in _emulate(assembly, _inputs(stream), dtype)
    ]
    result = _records(outputs, dtype) - code_offset(bits, dtype)
    matrix = result.transpose(1, 0, 2, 3).reshape(BLOCK_N, -1)
    np.testing.assert_array_equal(matrix[:rows, :columns], codes.numpy())
    assert not matrix[rows:].any() and not matrix[:, columns:].any()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_assembly_makes_weights_of_what_was_packed(
    bits: int, dtype: torch.dtype, groups: int
) -> None:
    """They are rounded once, whatever the zero point."""
    codes, stream = _planes(bits, BLOCK_N, 256)
    generator = torch.Generator().manual_seed(bits)
    size = (2, BLOCK_N, 2, groups)  # blocks of columns, rows, halves, groups
    scale = (torch.rand(size, generator=generator) + 0.5).to(dtype)
    nearest = torch.randint(1 << bits, size, generator=generator)
    rest = ((torch.rand(size, generator=generator) - 0.5) * scale.double()).to(dtype)
    shift = (-code_offset(bits, dtype) - nearest.double()).to(dtype)
    assert torch.equal(shift.double(), -code_offset(bits, dtype) - nearest.double())
    found = []
    for half in (0, 1):
        operands = [
            _twice(values[:, :, half, group])
            for group in range(groups)
            for values in (shift, scale, rest)
        ]
        assembly = decode_assembly(bits, dtype, half, groups)
        outputs = _emulate(assembly, _inputs(stream) + operands, dtype)
        found.append(_records(outputs, dtype))
    records = codes.view(BLOCK_N, 2, 2, groups, -1).transpose(0, 1).double()
    exact = (records - nearest[..., None]) * scale.double()[..., None] + rest.double()[..., None]
    result = torch.from_numpy(np.stack(found, 2)).view(exact.shape)
    assert torch.equal(result, exact.to(dtype).double())


@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_and_zero_points_are_exact(bits: int) -> None:
    _, scale, zero_point = random_matrix(40, 288, bits, 32, seed=1)
    order = torch.tensor([39, 0, 40, 7])
    pairs = pack_scales(scale, zero_point, bits, order, 12).numpy()
    halves = pairs.view(np.uint16).reshape(12, 4, 2).view(np.float16)
    exact_zero = zero_point.double().numpy() * 2**bits / 256
    for place, row in enumerate((39, 0, None, 7)):
        expected = np.zeros((12, 2))
        if row is not None:
            expected[:9, 0], expected[:9, 1] = scale[row].double(), exact_zero[row]
        np.testing.assert_array_equal(halves[:, place], expected)


def _inputs(stream: np.ndarray) -> list[np.ndarray]:
    """Return registers of words; two records share them: here, those of neighbouring lanes."""
    words = (stream << np.arange(16)).sum(-1).astype(np.uint32)  # [kb, n, lane, word]
    return [
        words[:, :, 0::2, word] | words[:, :, 1::2, word] << 16 for word in range(words.shape[-1])
    ]


def _twice(values: torch.Tensor) -> np.ndarray:
    """Return registers [kb, n, pairs of lanes] of a number for each row."""
    half = values.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return np.repeat((half | half << 16)[:, :, None], LANES // 2, 2)


def _records(outputs: list[np.ndarray], dtype: torch.dtype) -> np.ndarray:
    """Return the numbers of registers, [kb, n, output, lane]."""
    result = np.empty((*outputs[0].shape[:2], len(outputs), LANES))
    for h, output in enumerate(outputs):
        for record in (0, 1):
            half = (output >> np.uint32(16 * record)).astype(np.uint16)
            result[:, :, h, record::2] = _numbers(half, dtype)
    return result


def _numbers(half: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(half.view(np.int16)).view(dtype).double().numpy()


def _emulate(assembly: str, inputs: list[np.ndarray], dtype: torch.dtype) -> list[np.ndarray]:
    """Run PTX on arrays of 32-bit registers; refuses what it does not know."""
    registers = {f"${OUTPUTS + i}": value.astype(np.uint32) for i, value in enumerate(inputs)}

    def value(operand: str) -> np.ndarray:
        if operand in registers:
            return registers[operand]
        return np.full_like(inputs[0], int(operand, 0), dtype=np.uint32)

    def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros_like(a)
        for shift in (0, 16):
            x, y, z = (
                _numbers((v >> np.uint32(shift)).astype(np.uint16), dtype) for v in (a, b, c)
            )
            rounded = torch.from_numpy(x * y + z).to(dtype).view(torch.int16).numpy()
            result |= rounded.view(np.uint16).astype(np.uint32) << np.uint32(shift)
        return result

    operations: dict[str, Callable[..., np.ndarray]] = {
        "mov.b32": lambda a: a,
        "shr.b32": lambda a, count: a >> count,
        "shl.b32": lambda a, count: a << count,
        "lop3.b32": lambda a, b, c, table: _lop3(a, b, c, int(table.flat[0])),
        f"fma.rn.{'bf16x2' if dtype == torch.bfloat16 else 'f16x2'}": multiply_add,
    }
    body = re.fullmatch(r"\{ \.reg \.b32 [^;]*; (.*) \}", assembly)
    assert body
    for line in filter(None, map(str.strip, body[1].split(";"))):
        name, operands = line.split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        registers[target] = operations[name](*map(value, sources))
    return [registers[f"${h}"] for h in range(OUTPUTS)]


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Look up each bit: the table's bit 4 * a + 2 * b + c."""
    result = np.zeros_like(a)
    for entry in range(8):
        if table >> entry & 1:
            chosen = [
                operand if entry >> place & 1 else ~operand
                for place, operand in ((2, a), (1, b), (0, c))
            ]
            result |= chosen[0] & chosen[1] & chosen[2]
    return result
