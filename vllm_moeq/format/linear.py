"""Dense linear layers of a checkpoint, in the tensors of compressed-tensors' ``pack-quantized``.

vLLM has fast kernels for them. A weight [N, K] is stored as ``weight_packed`` int32
[N, K * bits / 32], whose bytes are those of :func:`vllm_moeq.format.packing.pack`;
``weight_scale`` bfloat16 [N, K / group_size]; and ``weight_shape``, which is [N, K]. The grid is
symmetric: ``weight = scale * (code - 2 ** (bits - 1))``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vllm_moeq.format.errors import FormatError

LINEAR_WIDTHS = (4, 8)
"""Bits per weight that a dense layer can have; one that the plan does not name has 16."""
LINEAR_TENSORS = ("weight_packed", "weight_scale", "weight_shape")
"""Suffixes of the tensors that replace a ``weight``."""
_METHOD, _FORMAT = "compressed-tensors", "pack-quantized"
_CODES_PER_INT32 = {bits: 32 // bits for bits in LINEAR_WIDTHS}


def check_linear_bits(linear_bits: Any) -> None:
    """Check the ``linear_bits`` of a plan: module names on disk to widths.

    Raises:
        FormatError: An unknown width, what is no name, or no object at all.
    """
    if not isinstance(linear_bits, Mapping):
        raise FormatError("linear_bits must be an object")
    for name, bits in linear_bits.items():
        if not isinstance(name, str):
            raise FormatError(f"linear_bits: {name!r} is no name of a layer")
        if type(bits) is not int or bits not in LINEAR_WIDTHS:
            raise FormatError(f"linear_bits[{name!r}]: {bits!r} is not one of {LINEAR_WIDTHS}")


def to_compressed_tensors(linear_bits: Mapping[str, int], group_size: int) -> dict[str, Any] | None:
    """Return the config by which compressed-tensors names these layers; None if there are none."""
    if not linear_bits:
        return None
    groups = {
        f"group_{index}": {
            "targets": [name for name, width in linear_bits.items() if width == bits],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": group_size,
            },
        }
        for index, bits in enumerate(sorted(set(linear_bits.values())))
    }
    return {"quant_method": _METHOD, "format": _FORMAT, "config_groups": groups, "ignore": []}


def from_compressed_tensors(config: Any, group_size: int) -> dict[str, int]:
    """Return the widths that a config of :func:`to_compressed_tensors` gives to layers.

    Raises:
        FormatError: It says anything that moeq would not write.
    """
    if config is None:
        return {}
    try:
        groups = config["config_groups"].values()
        linear_bits = {
            name: group["weights"]["num_bits"] for group in groups for name in group["targets"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"quantization_config.linear is damaged: {error!r}") from error
    check_linear_bits(linear_bits)
    if config != to_compressed_tensors(linear_bits, group_size):
        raise FormatError(
            "quantization_config.linear says what this version does not read: it knows symmetric "
            f"integers in groups of {group_size}, the group_size of the experts"
        )
    return linear_bits


def linear_tensors(
    rows: int, columns: int, bits: int, group_size: int
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Yield suffix, type and shape of the tensors that replace one weight [rows, columns].

    Raises:
        FormatError: The group size does not divide a row, or an unknown width.
    """
    if bits not in LINEAR_WIDTHS:
        raise FormatError(f"width {bits} of a dense layer is not one of {LINEAR_WIDTHS}")
    if columns % group_size:
        raise FormatError(f"group size {group_size} does not divide a row of {columns} weights")
    packed, scale, shape = LINEAR_TENSORS
    yield packed, torch.int32, (rows, columns // _CODES_PER_INT32[bits])
    yield scale, torch.bfloat16, (rows, columns // group_size)
    yield shape, torch.int64, (2,)


def linear_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Return the bytes of one weight [rows, columns] on disk, with its scales."""
    return sum(
        torch.Size(shape).numel() * dtype.itemsize
        for _, dtype, shape in linear_tensors(rows, columns, bits, group_size)
    )
