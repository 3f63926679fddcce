"""Weights that are stored in less than 16 bits, and how they become bfloat16 again.

What is read is one tensor at a time; the largest part of it that is in float32 is a few rows.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from moeq.checkpoint.mapped import Index
from moeq.checkpoint.reader import CheckpointReader, Reading, TensorInfo
from moeq.errors import MoeqError

_ROWS_AT_ONCE = 128
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("weight_scale_inv", "weight_scale")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of E2M1 without their sign, which is the fourth bit."""
_E8M0_BIAS = 127
_BLOCKS, _BLOCK_SCALES = "_blocks", "_scales"
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_zero_point")
"""What a quantized layer stores beside its weight; it says nothing about the weight."""


class SourceFormat(NamedTuple):
    """In which precision a checkpoint is stored.

    Attributes:
        name: For users; also in the provenance of what is made from it.
        block: (rows, columns) of a block that shares an FP8 scale; None if there are no blocks.
        bits: Width of packed integers; None for floating point.
    """

    name: str
    block: tuple[int, int] | None = None
    bits: int | None = None


def source_format(config: Mapping[str, Any], folder: object) -> SourceFormat | None:
    """Return how a model's ``config.json`` says that it is quantized; None if it is not.

    Raises:
        MoeqError: In a way that moeq does not read.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method", "unknown")
    if method == "fp8":
        return SourceFormat("fp8", _pair(quantization.get("weight_block_size")))
    if method == "mxfp4":
        return SourceFormat("mxfp4")
    if method == "compressed-tensors":
        groups = quantization.get("config_groups") or {}
        weights = [group["weights"] for group in groups.values() if group.get("weights")]
        formats = {group.get("format") or quantization.get("format") for group in groups.values()}
        if formats <= {"float-quantized", "naive-quantized"} and _same(weights, "type", "float"):
            return SourceFormat(
                "compressed-tensors float-quantized", _pair(weights[0].get("block_structure"))
            )
        bits = weights[0].get("num_bits") if weights else None
        if formats == {"pack-quantized"} and bits in (4, 8) and _same(weights, "num_bits", bits):
            return SourceFormat("compressed-tensors pack-quantized", bits=bits)
        method = f"compressed-tensors {', '.join(sorted(map(str, formats)))}"
    raise MoeqError(
        f"{folder} is quantized already (quant_method {method!r} in config.json); moeq starts from "
        "16- or 32-bit weights, FP8, MXFP4, or compressed-tensors float-quantized or pack-quantized"
    )


def readings(reader: CheckpointReader, source: SourceFormat) -> dict[str, Reading | None]:
    """Return how the quantized weights of a checkpoint are read, from headers and shapes alone.

    Args:
        reader: The checkpoint as stored.
        source: Its format.

    Returns:
        By stored name: how the weight that stands there is read; None for scales and the like,
        which are no tensors of the model.

    Raises:
        MoeqError: A weight lacks its scales, or they do not fit it; names it.
    """
    if source.name == "mxfp4":
        return dict(_mxfp4(reader))
    if source.bits is None:
        return dict(_fp8(reader, source.block))
    return dict(_packed(reader, source.bits))


def logical_name(name: str) -> str:
    """Return what a weight in lower precision is called in 16 bits, given its stored name."""
    return name.replace(".weight_packed", ".weight").removesuffix(_BLOCKS)


def _fp8(
    reader: CheckpointReader, block: tuple[int, int] | None
) -> Iterator[tuple[str, Reading | None]]:
    for name, info in reader.tensors.items():
        if info.dtype not in _FP8:
            continue
        module = name.removesuffix("weight")
        found = [module + suffix for suffix in _SCALES if module + suffix in reader.tensors]
        if module == name or len(info.shape) != 2 or len(found) != 1:
            raise MoeqError(
                f"{reader.folder}: {name} is {info.dtype} {list(info.shape)}, but there is no "
                f"{module}{_SCALES[0]} or {_SCALES[1]} that says what its values mean; moeq reads "
                "FP8 matrices with scales"
            )
        (scale,) = found
        sizes = _block_sizes(info.shape, reader.info(scale).shape, block)
        if sizes is None:
            raise MoeqError(
                f"{reader.folder}: {scale} {list(reader.info(scale).shape)} does not fit {name} "
                f"{list(info.shape)}: expected one scale, one for each row"
                + (f", or one for each block of {block[0]} x {block[1]}" if block else "")
            )
        yield name, Reading(info._replace(dtype="BF16"), _fp8_reader(reader, name, scale, sizes))
        yield scale, None
        yield from _dropped(reader, module, _OF_ACTIVATIONS)


def _fp8_reader(
    reader: CheckpointReader, name: str, scale_name: str, sizes: tuple[int, int]
) -> Callable[[], torch.Tensor]:
    file, scale_file = reader.info(name).file, reader.info(scale_name).file

    def read() -> torch.Tensor:
        codes = reader.stored(name, file)
        scale = reader.stored(scale_name, scale_file).float()
        scale = scale.view(-1, 1) if scale.ndim < 2 else scale
        rows, columns = torch.arange(codes.shape[0]) // sizes[0], codes.shape[1]
        result = torch.empty(codes.shape, dtype=torch.bfloat16)
        for start in range(0, len(codes), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            scales = scale[rows[part]].repeat_interleave(sizes[1], 1)[:, :columns]
            result[part] = codes[part].float() * scales
        return result

    return read


def _block_sizes(
    shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return how many (rows, columns) share a scale; None if the shapes do not say."""
    rows, columns = shape
    if torch.Size(scale).numel() == 1:
        return rows, columns
    if scale in ((rows,), (rows, 1)):
        return 1, columns
    if block is not None and scale == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    return None


def _mxfp4(reader: CheckpointReader) -> Iterator[tuple[str, Reading | None]]:
    """OCP's MXFP4: 32 weights of a row in 16 bytes, the first in the low half, share an E8M0."""
    for name, info in reader.tensors.items():
        module = name.removesuffix(_BLOCKS)
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
        yield name, Reading(TensorInfo(info.file, "BF16", (*rows, 32 * blocks)), read)
        yield scale_name, None


def _read_mxfp4(
    reader: CheckpointReader, blocks: tuple[str, str], scales: tuple[str, str], index: Index = ()
) -> torch.Tensor:
    codes = reader.stored(*blocks, index).contiguous()
    exponents = reader.stored(*scales, index).int() - _E8M0_BIAS
    *rows, groups = exponents.shape
    codes, exponents = codes.view(-1, groups, 16), exponents.reshape(-1, groups, 1)
    table = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=torch.bfloat16)
    result = torch.empty(len(codes), 32 * groups, dtype=torch.bfloat16)
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        halves = torch.stack([codes[part] & 15, codes[part] >> 4], -1).flatten(2)
        # Exact: a power of two times a value of few bits.
        result[part] = torch.ldexp(table[halves.int()], exponents[part]).flatten(1)
    return result.view(*rows, 32 * groups)


def _packed(reader: CheckpointReader, bits: int) -> Iterator[tuple[str, Reading | None]]:
    for name, info in reader.tensors.items():
        module = name.removesuffix("weight_packed")
        if module == name:
            continue
        stored = reader.stored(module + "weight_shape", reader.info(module + "weight_shape").file)
        rows, columns = stored.tolist()
        scale = reader.info(module + "weight_scale").shape
        fits = info.shape == (rows, -(-columns * bits // 32)) and len(scale) == 2
        if not fits or scale[0] != rows or columns % scale[1]:
            raise MoeqError(
                f"{reader.folder}: {name} {list(info.shape)} with scales {list(scale)} is no "
                f"matrix of {rows} x {columns} weights of {bits} bits, as weight_shape says"
            )
        if module + "weight_g_idx" in reader.tensors:
            raise MoeqError(
                f"{reader.folder}: {module}weight_g_idx reorders columns, which moeq does not "
                "read; start from the model before it was quantized"
            )
        shape = TensorInfo(info.file, "BF16", (rows, columns))
        yield name, Reading(shape, _packed_reader(reader, module, (rows, columns), bits))
        dropped = ("weight_scale", "weight_shape", "weight_zero_point", *_OF_ACTIVATIONS)
        yield from _dropped(reader, module, dropped)


def _packed_reader(
    reader: CheckpointReader, module: str, shape: tuple[int, int], bits: int
) -> Callable[[], torch.Tensor]:
    """Return what reads int32 words of codes, the first in the lowest bits."""
    files = {
        suffix: reader.info(module + suffix).file
        for suffix in ("weight_packed", "weight_scale", "weight_zero_point")
        if module + suffix in reader.tensors
    }

    def read() -> torch.Tensor:
        tensors = {key: reader.stored(module + key, file) for key, file in files.items()}
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

    return read


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes in int32 words [N, W]: int32 [N, W * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words.unsqueeze(2) >> shifts & ((1 << bits) - 1)).flatten(1)


def _dropped(
    reader: CheckpointReader, module: str, suffixes: tuple[str, ...]
) -> Iterator[tuple[str, None]]:
    for suffix in suffixes:
        if module + suffix in reader.tensors:
            yield module + suffix, None


def _pair(sizes: Any) -> tuple[int, int] | None:
    return None if sizes is None else (int(sizes[0]), int(sizes[1]))


def _same(weights: list[dict[str, Any]], key: str, value: object) -> bool:
    return bool(weights) and all(entry.get(key) == value for entry in weights)
