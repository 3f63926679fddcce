"""In which precision a checkpoint is stored, as its ``config.json`` says."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch

from moeq.checkpoint.dequantize import BLOCKS, Block, mxfp4_blocks, packed_integers, scaled
from moeq.checkpoint.reader import CheckpointReader, Reading
from moeq.checkpoint.servable import text_config
from moeq.errors import MoeqError

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where ``config.json``, or its part on the language model, says how weights are quantized."""
_OF_CACHE = (".k_scale", ".v_scale", ".q_scale", ".output_scale")
"""Scales of keys and values that a server stores in FP8; they say nothing about weights."""
_LOWER = ("F8_", "F6_", "F4")


class SourceFormat(NamedTuple):
    """In which precision a checkpoint is stored.

    Attributes:
        name: For users; also in the provenance of what is made from it.
        block: (rows, columns) of a block that shares an FP8 scale; None if there are no blocks.
        bits: Width of packed integers; None for floating point.
    """

    name: str
    block: Block | None = None
    bits: int | None = None


def source_format(config: Mapping[str, Any], folder: object) -> SourceFormat | None:
    """Return how a model's ``config.json`` says that it is quantized; None if it is not.

    Raises:
        MoeqError: In a way that moeq does not read.
    """
    parts = (config, text_config(config))
    stated = (part[key] for part in parts for key in QUANTIZATION_KEYS if part.get(key))
    quantization = next(stated, None)
    if quantization is None:
        return None
    try:
        return _stated_format(quantization, folder)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, MoeqError):
            raise
        raise MoeqError(
            f"{folder}: quantization_config in config.json is damaged ({error!r}); get the "
            "checkpoint again"
        ) from error


def _stated_format(quantization: Mapping[str, Any], folder: object) -> SourceFormat:
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
        method = f"compressed-tensors {', '.join(sorted(map(str, formats)))}, {bits} bits"
    raise MoeqError(
        f"{folder} is quantized already (quant_method {method!r} in config.json), in a way that "
        "moeq does not read. Start from the model before it was quantized, in 16 or 32 bits, or "
        "from FP8, MXFP4, or compressed-tensors float-quantized or pack-quantized (4 or 8 bits)"
    )


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` without what it says of the precision of the source."""
    kept = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if isinstance(kept.get("text_config"), Mapping):
        kept["text_config"] = unquantized(kept["text_config"])
    return kept


def readings(reader: CheckpointReader, source: SourceFormat | None) -> dict[str, Reading | None]:
    """Return how the quantized weights of a checkpoint are read, from headers and shapes alone.

    Args:
        reader: The checkpoint as stored.
        source: Its format; None if it says that it is not quantized.

    Returns:
        By stored name: how the weight that stands there is read; None for scales and the like,
        which are no tensors of the model.

    Raises:
        MoeqError: A weight lacks its scales, or they do not fit it, or nothing says in which way
            it is quantized; names it.
    """
    readings: dict[str, Reading | None] = {}
    if source is not None:
        if source.bits is not None:
            readings = dict(packed_integers(reader, source.bits))
        elif source.name == "mxfp4":
            readings = dict(chain(mxfp4_blocks(reader), scaled(reader, None)))
        else:
            readings = dict(scaled(reader, source.block))
        for name, info in reader.tensors.items():
            if name.endswith(_OF_CACHE) and torch.Size(info.shape).numel() == 1:
                readings.setdefault(name, None)
    for name, info in reader.tensors.items():
        if name not in readings and info.dtype.startswith(_LOWER):
            raise MoeqError(
                f"{reader.folder}: {name} is {info.dtype}, which quantization_config in "
                "config.json does not explain. Start from a release whose config.json says how it "
                "is quantized, or from the model in 16 bits"
            )
    return readings


def in_16_bits(reader: CheckpointReader) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a checkpoint, by name, as they are in its 16-bit release.

    Args:
        reader: The checkpoint as stored.

    Raises:
        MoeqError: As :func:`readings`.
    """
    lowered = readings(reader, source_format(reader.config, reader.folder))
    for name, info in reader.tensors.items():
        if name not in lowered:
            yield name, reader.stored(name, info.file)
        elif (reading := lowered[name]) is not None:
            tensor = reading.read()
            # Blocks are along the inputs, which come first in gpt-oss's 16-bit tensors.
            yield logical_name(name), tensor.mT.contiguous() if name.endswith(BLOCKS) else tensor


def logical_name(name: str) -> str:
    """Return what a weight in lower precision is called in 16 bits, given its stored name."""
    return name.replace(".weight_packed", ".weight").removesuffix(BLOCKS)


def _pair(sizes: Any) -> Block | None:
    if sizes is None:
        return None
    rows, columns = (int(size) for size in sizes)
    if min(rows, columns) < 1:
        raise ValueError(f"blocks of {rows} x {columns}")
    return rows, columns


def _same(weights: list[dict[str, Any]], key: str, value: object) -> bool:
    return bool(weights) and all(entry.get(key) == value for entry in weights)
