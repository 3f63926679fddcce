"""The main loop of the two matrix products: decodes weights and feeds them to the tensor cores.

Weights are the left operand, tokens the right one. There are two forms of it.

With few tokens codes enter as whole numbers. Scale and zero point stay out of the product: for each
group, with a = the sum of a token's values in it,

    result += scale * (products - (zero + offset) * a)

in float32, which is both less work per weight and more exact than rounding dequantized weights.

With many tokens that is too much work per token. There codes become weights,

    weight = (code - nearest) * scale + (nearest - zero) * scale

where ``nearest`` is the whole number next to the zero point: code - nearest is exact, and what is
added is at most half a step, so that its rounding does not matter. One product runs over all
groups.
"""
# Code for Triton's compiler: no annotations, and conditions of the compiler apart from others.
# ruff: noqa: D417, SIM102
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from vllm_moeq.format import WIDTHS
from vllm_moeq.kernels.triton import planes

BLOCK_K: tl.constexpr = tl.constexpr(planes.BLOCK_K)
LANES: tl.constexpr = tl.constexpr(planes.LANES)
OUTPUTS: tl.constexpr = tl.constexpr(planes.OUTPUTS)
WORDS_PER_UNIT: tl.constexpr = tl.constexpr(planes.ALIGNMENT // 2)
TABLE_COLUMNS: tl.constexpr = tl.constexpr(5)
"""Of each expert's row: width and offset of w13, those of w2, place in the order of work."""

# Triton lets a function that runs while it compiles use constants only, no other functions.
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WIDTHS: tl.constexpr = tl.constexpr(WIDTHS)
_WIDTH_COUNT: tl.constexpr = tl.constexpr(len(WIDTHS))
_SEGMENTS: tl.constexpr = tl.constexpr({bits: planes.segments(bits) for bits in WIDTHS})
_ASSEMBLY: tl.constexpr = tl.constexpr(
    {
        (bits, name, half, groups): planes.decode_assembly(bits, dtype, half, groups)
        for bits in WIDTHS
        for name, dtype in _DTYPES.items()
        for half in (0, 1)
        for groups in (0, 1, 2)
    }
)
_CONSTRAINTS: tl.constexpr = tl.constexpr(
    {(bits, groups): planes.constraints(bits, groups) for bits in WIDTHS for groups in (0, 1, 2)}
)
_OFFSETS: tl.constexpr = tl.constexpr(
    {
        (bits, name): planes.code_offset(bits, dtype)
        for bits in WIDTHS
        for name, dtype in _DTYPES.items()
    }
)


@triton.constexpr_function
def _width(index):
    return _WIDTHS.value[index]


@triton.constexpr_function
def _segments(bits, code):
    return len(_SEGMENTS.value[bits][code])


@triton.constexpr_function
def _segment(bits, code, index, field):
    return _SEGMENTS.value[bits][code][index][field]


@triton.constexpr_function
def _assembly(bits, dtype, half, groups):
    return _ASSEMBLY.value[bits, dtype.name, half, groups]


@triton.constexpr_function
def _constraints(bits, groups):
    return _CONSTRAINTS.value[bits, groups]


@triton.constexpr_function
def _outputs(dtype):
    return (dtype,) * planes.OUTPUTS


@triton.constexpr_function
def _offset(bits, dtype):
    return _OFFSETS.value[bits, dtype.name]


@triton.jit
def _decode(
    words, HALF: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Return the codes of one half of the columns, plus the offset: 8 tensors like a word."""
    if INTERPRETED:
        codes = _decode_interpreted(words, HALF, BITS, _offset(BITS, DTYPE))
    else:
        codes = tl.inline_asm_elementwise(
            _assembly(BITS, DTYPE, HALF, 0),
            _constraints(BITS, 0),
            words,
            dtype=_outputs(DTYPE),
            is_pure=True,
            pack=2,
        )
    return codes


@triton.jit
def _decode_interpreted(words, HALF: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """Do what the assembly does, for the interpreter, which has neither it nor bfloat16."""
    codes = ()
    for h in tl.static_range(HALF * OUTPUTS, (HALF + 1) * OUTPUTS):
        code = tl.zeros_like(words[0]).to(tl.int32)
        for i in tl.static_range(_segments(BITS, h)):
            word = words[_segment(BITS, h, i, 0)].to(tl.int32)
            bits = (word >> _segment(BITS, h, i, 1)) & ((1 << _segment(BITS, h, i, 2)) - 1)
            code |= bits << _segment(BITS, h, i, 3)
        codes = codes + (code.to(tl.float32) + OFFSET,)
    return codes


@triton.jit
def _rounded(values, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round float32; the interpreter, which cuts bfloat16 off, goes on with float32."""
    if not INTERPRETED:
        result = values.to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = values.to(DTYPE).to(tl.float32)
    return result


@triton.jit
def _load_scales(
    scale_ptr, N, GROUPS: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return shift, scale and rest of each group, [BLOCK_N, 1]; see ``decode_assembly``."""
    scales = ()
    for i in tl.static_range(GROUPS):
        pair = tl.load(scale_ptr + i * N)[:, None]
        scale = _half(pair)
        zero = _half(pair >> 16)
        nearest = tl.floor(zero + 0.5)
        shift = -OFFSET - nearest
        rest = (nearest - zero) * scale
        scales = scales + (
            _rounded(shift, DTYPE, INTERPRETED),
            _rounded(scale, DTYPE, INTERPRETED),
            _rounded(rest, DTYPE, INTERPRETED),
        )
    return scales


@triton.jit
def _dequantize(
    words, scales, HALF: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return weights of one half of the records' columns: tensors of the shape of a word."""
    GROUPS: tl.constexpr = len(scales) // 3
    if INTERPRETED:
        weights = ()
        codes = _decode_interpreted(words, HALF, BITS, _offset(BITS, DTYPE))
        for h in tl.static_range(OUTPUTS):
            i: tl.constexpr = h * GROUPS // OUTPUTS * 3
            weight = (codes[h] + scales[i]) * scales[i + 1] + scales[i + 2]
            weights = weights + (_rounded(weight, DTYPE, True),)
    else:
        weights = tl.inline_asm_elementwise(
            _assembly(BITS, DTYPE, HALF, GROUPS),
            _constraints(BITS, GROUPS),
            words + scales,
            dtype=_outputs(DTYPE),
            is_pure=True,
            pack=2,
        )
    return weights


@triton.jit
def _columns(codes, FIRST: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Put COUNT tensors [ROWS, LANES] side by side."""
    if COUNT == 1:
        result = codes[FIRST]
    else:
        left = _columns(codes, FIRST, COUNT // 2, ROWS)
        right = _columns(codes, FIRST + COUNT // 2, COUNT // 2, ROWS)
        result = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (ROWS, LANES * COUNT))
    return result


@triton.jit
def _load_groups(scale_ptr, sums_ptr, block, rows, N, PER_BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Return scales with zero points, and token sums, of all groups of a block of columns."""
    pairs = ()
    sums = ()
    for i in tl.static_range(PER_BLOCK):
        group = block * PER_BLOCK + i
        pairs = pairs + (tl.load(scale_ptr + group * N + rows),)
        total = tl.load(sums_ptr + group * PARTS)
        for part in tl.static_range(1, PARTS):
            total += tl.load(sums_ptr + group * PARTS + part)
        sums = sums + (total,)
    return pairs, sums


@triton.jit
def _half(pair):
    return (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_words(w_ptr, plane, BITS: tl.constexpr):
    words = (tl.load(w_ptr),)
    for i in tl.static_range(1, BITS):
        words = words + (tl.load(w_ptr + i * plane),)
    return words


@triton.jit
def _load_tokens(
    x_ptr, x_mask, first, K, COUNT: tl.constexpr, MASK_K: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Return columns [first, first + COUNT) of tokens, [COUNT, BLOCK_M], the first at x_ptr."""
    columns = tl.arange(0, COUNT)[:, None]
    mask = x_mask & (first + columns < K) if MASK_K else x_mask
    x = tl.load(x_ptr + columns, mask=mask, other=0.0)
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def _accumulate_codes(
    acc, x_ptr, x_mask, w_ptr, scale_ptr, sums_ptr, rows, N, K, first, last,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, PARTS: tl.constexpr, MASK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Add the products of blocks [first, last) of columns, a group at a time.

    A group of a whole block takes two pieces: the fewer codes are in registers, the more programs
    are on a multiprocessor.

    Args:
        acc: float32 [BLOCK_N, BLOCK_M].
        x_ptr: Addresses of the tokens, [1, BLOCK_M].
        x_mask: Which of them exist.
        w_ptr: Addresses of the first block's first words, [BLOCK_N, LANES].
        scale_ptr: Scales of the expert.
        sums_ptr: Addresses of the tokens' sums, [BLOCK_M]: PARTS numbers for each group.
        rows: int [BLOCK_N], of N.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PER_BLOCK: tl.constexpr = BLOCK_K // GROUP_SIZE
    PIECES: tl.constexpr = 1 if PER_BLOCK == 1 else PER_BLOCK // 2  # of half a block
    PIECE: tl.constexpr = BLOCK_K // 2 // PIECES
    PER_PIECE: tl.constexpr = OUTPUTS // PIECES
    plane = N * LANES
    # Fetched a block ahead: Triton pipelines only what tl.dot reads.
    pairs, sums = _load_groups(scale_ptr, sums_ptr, first, rows, N, PER_BLOCK, PARTS)
    for block in range(first, last):
        words = _load_words(w_ptr, plane, BITS)
        following = tl.minimum(block + 1, last - 1)
        next_pairs, next_sums = _load_groups(
            scale_ptr, sums_ptr, following, rows, N, PER_BLOCK, PARTS
        )
        for half in tl.static_range(2):
            codes = _decode(words, half, BITS, DTYPE, INTERPRETED)
            for piece in tl.static_range(PIECES):
                if half == 0 or PER_BLOCK > 1:  # a group begins
                    products = tl.zeros_like(acc)
                column = block * BLOCK_K + (half * PIECES + piece) * PIECE
                x = _load_tokens(x_ptr + column, x_mask, column, K, PIECE, MASK_K, INTERPRETED)
                own = _columns(codes, piece * PER_PIECE, PER_PIECE, BLOCK_N)
                products = tl.dot(own, x, products)
                if half == 1 or PER_BLOCK > 1:  # it ends
                    pair = pairs[(half * PIECES + piece) * PIECE // GROUP_SIZE]
                    token_sum = sums[(half * PIECES + piece) * PIECE // GROUP_SIZE]
                    zero = _half(pair >> 16) + _offset(BITS, DTYPE)
                    acc += _half(pair)[:, None] * (products - zero[:, None] * token_sum[None, :])
        pairs, sums = next_pairs, next_sums
        w_ptr += BITS * plane
    return acc


@triton.jit
def _accumulate_weights(
    acc, x_ptr, x_mask, w_ptr, scale_ptr, rows, N, K, first, last,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, MASK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Do the same with weights, half a block at a time; arguments as there."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PER_BLOCK: tl.constexpr = BLOCK_K // GROUP_SIZE
    plane = N * LANES
    scale_ptr += first * (PER_BLOCK * N) + rows
    x_ptr += first * BLOCK_K
    for block in range(first, last):
        words = _load_words(w_ptr, plane, BITS)
        scales = _load_scales(scale_ptr, N, PER_BLOCK, _offset(BITS, DTYPE), DTYPE, INTERPRETED)
        for half in tl.static_range(2):
            acc = _accumulate_half(
                acc, x_ptr, x_mask, words, scales, block * BLOCK_K, K, half,
                BITS, PER_BLOCK, MASK_K, BLOCK_N, INTERPRETED,
            )  # fmt: skip
        w_ptr += BITS * plane
        scale_ptr += PER_BLOCK * N
        x_ptr += BLOCK_K
    return acc


@triton.jit
def _accumulate_half(
    acc, x_ptr, x_mask, words, scales, column, K, HALF: tl.constexpr,
    BITS: tl.constexpr, PER_BLOCK: tl.constexpr, MASK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = BLOCK_K // 2
    FIRST: tl.constexpr = 3 * (HALF * PER_BLOCK // 2)
    LAST: tl.constexpr = 3 * (((HALF + 1) * PER_BLOCK + 1) // 2)
    weights = _dequantize(words, scales[FIRST:LAST], HALF, BITS, DTYPE, INTERPRETED)
    x = _load_tokens(
        x_ptr + HALF * COLUMNS, x_mask, column + HALF * COLUMNS, K, COLUMNS, MASK_K, INTERPRETED
    )
    acc = tl.dot(_columns(weights, 0, OUTPUTS, BLOCK_N), x, acc)
    if not INTERPRETED:
        # Reads the sums, and so waits for the product: its registers are free for the next weights.
        # Triton 3.6 lets products run on in other loops like this one, while the next weights
        # overwrite what they still read.
        acc = tl.inline_asm_elementwise("", "=r,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def multiply(
    x_ptr,
    x_mask,
    w_ptr,
    scale_ptr,
    sums_ptr,
    table_ptr,
    expert,
    rows,
    N,
    K,
    first,
    last,
    PROJECTION: tl.constexpr,
    WIDTH_SET: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    MASK_K: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Multiply rows of one expert's matrix with tokens, at the expert's width.

    Returns:
        float32 [BLOCK_N, BLOCK_M].
    """
    entry = table_ptr + expert * TABLE_COLUMNS + 2 * PROJECTION
    bits = tl.load(entry)
    # In units of 128 bytes: the compiler knows that the address is aligned.
    w_ptr += tl.load(entry + 1).to(tl.int64) * WORDS_PER_UNIT
    scale_ptr += expert.to(tl.int64) * (tl.cdiv(K, BLOCK_K) * (BLOCK_K // GROUP_SIZE)) * N
    w_ptr += first * (bits * (N * LANES)) + rows[:, None] * LANES + tl.arange(0, LANES)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in tl.static_range(_WIDTH_COUNT):
        if (WIDTH_SET >> _width(i)) & 1:
            if bits == _width(i):
                if DEQUANTIZE:
                    acc = _accumulate_weights(
                        acc, x_ptr, x_mask, w_ptr, scale_ptr, rows, N, K, first, last,
                        _width(i), GROUP_SIZE, MASK_K, BLOCK_N, INTERPRETED,
                    )  # fmt: skip
                else:
                    acc = _accumulate_codes(
                        acc, x_ptr, x_mask, w_ptr, scale_ptr, sums_ptr, rows, N, K, first, last,
                        _width(i), GROUP_SIZE, PARTS, MASK_K, BLOCK_N, INTERPRETED,
                    )  # fmt: skip
    return acc
