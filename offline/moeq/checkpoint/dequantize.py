"""How weights in less than 16 bits become bfloat16 again.

What is read is a matrix, or some rows of it; the largest part that is in float32 is a few rows.
"""

from collections.abc import Iterator
from functools import partial

import torch

from moeq.checkpoint.mapped import Index
from moeq.checkpoint.reader import CheckpointReader, Integers, Reading, TensorInfo
from moeq.errors import MoeqError

Readings = Iterator[tuple[str, Reading | None]]
"""Stored names, each with how the weight there is read; None for what is no tensor of the model."""
Block = tuple[int, int]
"""(rows, columns) that share a scale."""
BLOCKS = "_blocks"
_BLOCK_SCALES = "_scales"
_ROWS_AT_ONCE = 128
_FP8 = ("F8_E4M3", "F8_E5M2")
_TWO_FP4_IN_A_BYTE = ("I8", "U8")
_FP4 = (*_TWO_FP4_IN_A_BYTE, "F4")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of FP4 without their sign, which is the fourth bit."""
_GROUP = 32
"""FP4 weights that share a scale."""
_E8M0 = ("F8_E8M0", "U8")
_E8M0_BIAS = 127
_SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale")
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_zero_point")
"""What a quantized layer stores beside its weight; it says nothing about the weight."""


def scaled(reader: CheckpointReader, block: Block | None) -> Readings:
    """Find FP8 weights, and MXFP4 ones with two weights in a byte, with scales named after them.

    They are matrices, or those of all experts: [experts, rows, columns].

    Args:
        reader: The checkpoint as stored.
        block: What shares a scale, if blocks do.

    Raises:
        MoeqError: A weight has no scales, or none that fit; names it.
    """
    for name, info in reader.tensors.items():
        module = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
        scales = [module + suffix for suffix in _SCALES if module + suffix in reader.tensors]
        if info.dtype not in (*_FP8, *_FP4) or (info.dtype in _TWO_FP4_IN_A_BYTE and not scales):
            continue
        if len(info.shape) not in (2, 3) or len(scales) != 1:
            raise MoeqError(
                f"{reader.folder}: {name} is {info.dtype} {list(info.shape)}, and beside it stands "
                f"{' and '.join(scales) or 'nothing'} to say what its values mean; moeq reads "
                f"matrices with one tensor of scales, such as {module}{_SCALES[0]}"
            )
        (scale,) = scales
        yield name, (_fp8 if info.dtype in _FP8 else _fp4)(reader, name, scale, block)
        yield scale, None
        yield from _dropped(reader, module, _OF_ACTIVATIONS)


def _fp8(reader: CheckpointReader, name: str, scale: str, block: Block | None) -> Reading:
    info, scale_info = reader.info(name), reader.info(scale)
    fused, single = len(info.shape) == 3, torch.Size(scale_info.shape).numel() == 1
    grid = _grid(info.shape, scale_info.shape)
    halves = name.endswith(("gate_up_proj", "gate_up_proj.weight"))
    sizes = None if grid is None else _sizes(info.shape, grid, block, halves)
    if grid is None or sizes is None or scale_info.dtype not in ("F32", "BF16", "F16", *_E8M0):
        raise MoeqError(
            f"{reader.folder}: {scale} {scale_info.dtype} {list(scale_info.shape)} does not fit "
            f"{name} {list(info.shape)}: expected one scale, one for each "
            f"{'expert or row' if fused else 'row'}"
            + (f", or one for each block of {block[0]} x {block[1]}" if block else "")
            + (", of whole blocks" if fused and block else "")
        )

    def read(index: Index = ()) -> torch.Tensor:
        if fused and not index:
            return torch.stack([read((expert,)) for expert in range(info.shape[0])])
        codes = reader.stored(name, info.file, index)
        part_of_scales = index[:1] if fused and not single else ()
        scales = _scale_values(reader.stored(scale, scale_info.file, part_of_scales)).view(grid)
        selected = index[-1] if len(index) == len(info.shape) - 1 else slice(None)
        rows = torch.arange(info.shape[-2])[selected] // sizes[0]
        result = torch.empty(codes.shape, dtype=torch.bfloat16)
        for start in range(0, len(codes), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            columns = scales[rows[part]].repeat_interleave(sizes[1], 1)[:, : codes.shape[1]]
            result[part] = codes[part].float() * columns
        return result

    return Reading(info._replace(dtype="BF16"), read)


def _grid(shape: tuple[int, ...], scales: tuple[int, ...]) -> Block | None:
    """Return how many (rows, columns) of scales a matrix has; None if their shape does not say."""
    if torch.Size(scales).numel() == 1:
        return 1, 1
    if len(shape) == 3:
        if scales[0] != shape[0] or len(scales) > 3:
            return None
        scales = scales[1:]
        return (1, 1) if torch.Size(scales).numel() == 1 else _pair(scales)
    return (shape[0], 1) if scales == shape[:1] else _pair(scales)


def _pair(sizes: tuple[int, ...]) -> Block | None:
    return (sizes[0], sizes[1]) if len(sizes) == 2 else None


def _sizes(shape: tuple[int, ...], grid: Block, block: Block | None, halves: bool) -> Block | None:
    """Return how many (rows, columns) share a scale; None if that is not clear.

    Where experts are fused, blocks that do not divide a side leave open whether they start anew
    with its second half.

    Args:
        shape: Of the weight.
        grid: Scales of a matrix.
        block: What the model declares.
        halves: Whether gate and up may have a scale each.
    """
    sizes = []
    for length, scales, size in zip(shape[-2:], grid, block or (0, 0), strict=True):
        if not length or not scales:
            return None
        if scales in (1, length):
            sizes.append(length // scales)
        elif size and scales == -(-length // size) and (len(shape) == 2 or length % size == 0):
            sizes.append(size)
        elif halves and scales == 2 and length % 2 == 0 and (not size or length <= size):
            sizes.append(length // 2)
        else:
            return None
    return sizes[0], sizes[1]


def _scale_values(stored: torch.Tensor) -> torch.Tensor:
    """Return scales in float32; a byte is the exponent of a power of two (E8M0)."""
    return (stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored).float()


def _fp4(reader: CheckpointReader, name: str, scale: str, block: Block | None) -> Reading:
    info, scale_info = reader.info(name), reader.info(scale)
    *rows, columns = info.shape
    if info.dtype in _TWO_FP4_IN_A_BYTE:
        columns *= 2
    fits = scale_info.shape == (*rows, columns / _GROUP) and scale_info.dtype in _E8M0
    # safetensors cannot cut parts out of F4.
    if not fits or (info.dtype == "F4" and len(rows) > 1):
        raise MoeqError(
            f"{reader.folder}: {name} {info.dtype} {list(info.shape)} with {scale} "
            f"{scale_info.dtype} {list(scale_info.shape)} is no MXFP4: expected two weights in a "
            f"byte and an E8M0 scale for each {_GROUP} of a row"
        )
    files = (name, info.file), (scale, scale_info.file)
    return Reading(
        TensorInfo(info.file, "BF16", (*rows, columns)), partial(_read_mxfp4, reader, *files)
    )


def mxfp4_blocks(reader: CheckpointReader) -> Readings:
    """Find OCP's MXFP4 as gpt-oss is released: blocks [..., 16] of 32 weights, and their scales.

    Raises:
        MoeqError: Blocks have no scales, or none that fit; names them.
    """
    for name, info in reader.tensors.items():
        module = name.removesuffix(BLOCKS)
        if module == name:
            continue
        scale_name = module + _BLOCK_SCALES
        scale = reader.info(scale_name)
        fits = len(info.shape) >= 3 and info.shape[-1] == 16 and scale.shape == info.shape[:-1]
        if not fits or {info.dtype, scale.dtype} != {"U8"}:
            raise MoeqError(
                f"{reader.folder}: {name} {info.dtype} {list(info.shape)} with {scale_name} "
                f"{scale.dtype} {list(scale.shape)} is no MXFP4: expected U8, 16 bytes for each "
                "scale"
            )
        *rows, blocks, _ = info.shape
        read = partial(_read_mxfp4, reader, (name, info.file), (scale_name, scale.file))
        yield name, Reading(TensorInfo(info.file, "BF16", (*rows, _GROUP * blocks)), read)
        yield scale_name, None


def _read_mxfp4(
    reader: CheckpointReader, weights: tuple[str, str], scales: tuple[str, str], index: Index = ()
) -> torch.Tensor:
    """Read codes, of which the first is in the low half of a byte, and their E8M0 scales."""
    codes = reader.stored(*weights, index).contiguous().view(torch.uint8)
    stored = reader.stored(*scales, index).contiguous().view(torch.uint8)
    *rows, groups = stored.shape
    codes = codes.view(-1, groups, _GROUP // 2)
    exponents = stored.reshape(-1, groups, 1).int() - _E8M0_BIAS
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.bfloat16)
    result = torch.empty(len(codes), _GROUP * groups, dtype=torch.bfloat16)
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        halves = torch.stack([codes[part] & 15, codes[part] >> 4], -1).flatten(2)
        # Exact: a power of two times a value of few bits.
        result[part] = torch.ldexp(table[halves.int()], exponents[part]).flatten(1)
    return result.view(*rows, _GROUP * groups)


def packed_integers(reader: CheckpointReader, bits: int) -> Readings:
    """Find matrices that compressed-tensors has packed into int32 words.

    Args:
        reader: The checkpoint as stored.
        bits: Width of a weight.

    Raises:
        MoeqError: A matrix lacks its scales or its shape, they do not fit it, or its columns are
            reordered; names it.
    """
    for name, info in reader.tensors.items():
        module = name.removesuffix("weight_packed")
        if module == name:
            continue
        stated = reader.info(module + "weight_shape")
        stored = reader.stored(module + "weight_shape", stated.file)
        if stated.dtype not in ("I32", "I64") or stored.numel() != 2 or stored.min() < 1:
            raise MoeqError(
                f"{reader.folder}: {module}weight_shape is {stored.tolist()}, expected the rows "
                "and columns of one matrix"
            )
        rows, columns = stored.flatten().tolist()
        scale = reader.info(module + "weight_scale").shape
        fits = info.shape == (rows, -(-columns * bits // 32)) and len(scale) == 2
        if not fits or scale[0] != rows or scale[1] < 1 or columns % scale[1]:
            raise MoeqError(
                f"{reader.folder}: {name} {list(info.shape)} with scales {list(scale)} is no "
                f"matrix of {rows} x {columns} weights of {bits} bits, as weight_shape says"
            )
        if module + "weight_g_idx" in reader.tensors:
            raise MoeqError(
                f"{reader.folder}: {module}weight_g_idx reorders columns, which moeq does not "
                "read; start from the model before it was quantized"
            )
        files = {
            suffix: (module + suffix, reader.info(module + suffix).file)
            for suffix in ("weight_packed", "weight_scale", "weight_zero_point")
            if module + suffix in reader.tensors
        }
        integers = None
        if "weight_zero_point" not in files and info.dtype == "I32":
            read = {suffix: partial(reader.stored, *file) for suffix, file in files.items()}
            integers = Integers(
                bits, columns // scale[1], read["weight_packed"], read["weight_scale"]
            )
        yield (
            name,
            Reading(
                TensorInfo(info.file, "BF16", (rows, columns)),
                partial(_read_packed, reader, files, (rows, columns), bits),
                integers,
            ),
        )
        dropped = ("weight_scale", "weight_shape", "weight_zero_point", *_OF_ACTIVATIONS)
        yield from _dropped(reader, module, dropped)


def _read_packed(
    reader: CheckpointReader, files: dict[str, tuple[str, str]], shape: Block, bits: int
) -> torch.Tensor:
    """Read int32 words of codes, the first in the lowest bits."""
    tensors = {suffix: reader.stored(*file) for suffix, file in files.items()}
    scale = tensors["weight_scale"].float()
    zero = torch.full((1, 1), float(1 << (bits - 1)))
    if "weight_zero_point" in tensors:  # packed along the rows
        zero = _unpack(tensors["weight_zero_point"].T, bits).T[: shape[0]].float()
    zero = zero.expand(shape[0], scale.shape[1])
    result = torch.empty(shape, dtype=torch.bfloat16)
    for start in range(0, shape[0], _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        codes = _unpack(tensors["weight_packed"][part], bits)[:, : shape[1]].float()
        groups = codes.reshape(len(codes), scale.shape[1], -1)
        weights = (groups - zero[part].unsqueeze(2)) * scale[part].unsqueeze(2)
        result[part] = weights.flatten(1)
    return result


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes in int32 words [N, W]: int32 [N, W * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words.unsqueeze(2) >> shifts & ((1 << bits) - 1)).flatten(1)


def _dropped(reader: CheckpointReader, module: str, suffixes: tuple[str, ...]) -> Readings:
    for suffix in suffixes:
        if module + suffix in reader.tensors:
            yield module + suffix, None
