"""Bit packing against numpy's bit streams and the worked layout of the format."""

import numpy as np
import pytest
import torch

from support import reference
from vllm_moeq.format import WIDTHS, FormatError, dequantize, pack, packed_columns, unpack

every_width = pytest.mark.parametrize("bits", WIDTHS)


def _codes(bits: int, rows: int = 5, columns: int = 192) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1], [0b10001101]),
        (2, [1, 0, 3, 2, 0, 0, 0, 3], [0b10110001, 0b11000000]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11010001, 0b01011000, 0b00011111]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x21, 0x43, 0x65, 0x87]),
        (8, [1, 2, 3, 4, 5, 6, 7, 255], [1, 2, 3, 4, 5, 6, 7, 255]),
    ],
)
def test_layout_is_row_major_and_least_significant_bit_first(
    bits: int, codes: list[int], expected: list[int]
) -> None:
    assert pack(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [expected]


@every_width
def test_packed_codes_are_read_back_bit_by_bit(bits: int) -> None:
    codes = _codes(bits)
    np.testing.assert_array_equal(reference.unpack_bits(pack(codes, bits).numpy(), bits), codes)


@every_width
def test_unpack_reads_an_independent_bit_stream(bits: int) -> None:
    codes = _codes(bits)
    stream = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little")
    assert torch.equal(unpack(torch.from_numpy(packed), bits), codes)


@every_width
@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (1, 128)])
def test_small_shapes_survive_the_round_trip(bits: int, shape: tuple[int, int]) -> None:
    packed = pack(_codes(bits, *shape), bits)
    assert packed.shape == (shape[0], shape[1] * bits // 8)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits), _codes(bits, *shape))


@every_width
def test_inputs_stay_as_they_were(bits: int) -> None:
    codes = _codes(bits)
    packed = pack(codes, bits)
    before = packed.clone()
    unpack(packed, bits).zero_()
    assert torch.equal(codes, _codes(bits))
    assert torch.equal(packed, before)


@every_width
def test_transposed_codes_are_packed_by_value(bits: int) -> None:
    codes = _codes(bits, 64, 8).t()
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@every_width
@pytest.mark.parametrize("group_size", [32, 64])
def test_a_slice_of_columns_holds_exactly_those_groups(bits: int, group_size: int) -> None:
    codes = _codes(bits)
    start, length = group_size, 2 * group_size
    part = pack(codes, bits).narrow(1, start * bits // 8, length * bits // 8)
    assert torch.equal(unpack(part, bits), codes[:, start : start + length])


@every_width
@pytest.mark.parametrize("group_size", [32, 64, 128])  # of the last, the second group has 64
def test_dequantize_is_exact(bits: int, group_size: int) -> None:
    codes, groups = _codes(bits), -(-192 // group_size)
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(5, groups, generator=generator).half()
    zero = torch.randint(0, 256, (5, groups), generator=generator, dtype=torch.uint8)
    expected = reference.dequantize(pack(codes, bits), scale, zero, group_size, bits)
    result = dequantize(pack(codes, bits), scale, zero, bits, group_size)
    assert result.dtype == torch.float32
    assert torch.equal(result.double(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dequantize_rounds_once_to_the_type_asked_for(dtype: torch.dtype) -> None:
    packed, scale = pack(_codes(8), 8), torch.full((5, 3), 0.1).half()
    zero = torch.full((5, 3), 77, dtype=torch.uint8)
    expected = reference.dequantize(packed, scale, zero, 64).to(dtype)
    assert torch.equal(dequantize(packed, scale, zero, 8, 64, dtype), expected)


def test_groups_that_a_row_does_not_have_are_named() -> None:
    packed, scale = pack(_codes(4), 4), torch.ones(5, 2).half()
    with pytest.raises(FormatError, match="2 scales of a row do not fit 192 weights .* of 64"):
        dequantize(packed, scale, torch.zeros(5, 2, dtype=torch.uint8), 4, 64)


@pytest.mark.parametrize("bits", [0, 5, 7, 16, -1])
def test_an_unknown_width_is_named(bits: int) -> None:
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    for call in (lambda: packed_columns(8, bits), lambda: pack(codes, bits)):
        with pytest.raises(FormatError, match=f"width {bits}"):
            call()
    with pytest.raises(FormatError, match=f"width {bits}"):
        unpack(codes, bits)


@every_width
def test_rows_that_are_no_multiple_of_eight_are_refused(bits: int) -> None:
    with pytest.raises(FormatError, match="12 weights"):
        pack(torch.zeros(1, 12, dtype=torch.uint8), bits)


def test_codes_of_another_type_are_refused() -> None:
    with pytest.raises(FormatError, match="int32"):
        pack(torch.zeros(1, 8, dtype=torch.int32), 2)
