"""The ``quantization_config`` of a packed checkpoint and the tensors that it promises."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_moeq.format.errors import FormatError
from vllm_moeq.format.packing import num_groups, packed_columns
from vllm_moeq.format.plan import BitPlan

QUANT_METHOD = "moeq"


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """``quantization_config`` in the ``config.json`` of a packed checkpoint.

    Attributes:
        plan: Widths and group size of all experts.
    """

    plan: BitPlan

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"quant_method": QUANT_METHOD, **self.plan.to_dict(), "linear": None}

    @classmethod
    def from_dict(cls, data: Any) -> "CheckpointConfig":
        """Read the JSON form.

        Raises:
            FormatError: Not a moeq checkpoint, or a part that this version cannot read.
        """
        if not isinstance(data, Mapping):
            raise FormatError("quantization_config must be a JSON object")
        if data.get("quant_method") != QUANT_METHOD:
            raise FormatError(
                f"quantization_config.quant_method is {data.get('quant_method')!r}, "
                f"not {QUANT_METHOD!r}: this checkpoint was not written by moeq"
            )
        if data.get("linear") is not None:
            raise FormatError(
                "quantization_config.linear is set, but this version reads only checkpoints whose "
                "dense layers are unquantized"
            )
        return cls(plan=BitPlan.from_dict(data))


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One tensor on disk: ``{projection}.{suffix}`` of an expert."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, int]


def packed_tensors(rows: int, columns: int, bits: int, group_size: int) -> Iterator[ExpertTensor]:
    """Yield the tensors that replace one weight [rows, columns] on disk.

    Raises:
        FormatError: ``columns`` is not a multiple of 8, or an unknown width.
    """
    groups = num_groups(columns, group_size)
    yield ExpertTensor("weight_packed", torch.uint8, (rows, packed_columns(columns, bits)))
    yield ExpertTensor("weight_scale", torch.float16, (rows, groups))
    yield ExpertTensor("weight_zero_point", torch.uint8, (rows, groups))


def packed_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Return the bytes of one weight [rows, columns] on disk, with scales and zero points."""
    return sum(
        tensor.shape[0] * tensor.shape[1] * tensor.dtype.itemsize
        for tensor in packed_tensors(rows, columns, bits, group_size)
    )
