"""The ``quantization_config`` of a packed checkpoint and the tensors that it promises."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_moeq.format.errors import FormatError
from vllm_moeq.format.linear import from_compressed_tensors, to_compressed_tensors
from vllm_moeq.format.packing import num_groups, packed_columns
from vllm_moeq.format.plan import BitPlan

QUANT_METHOD = "moeq"
TRANSFORMERS_GUARD = {
    "transformers_weights": "experts are packed by moeq: `import vllm_moeq.hf` first, or use vLLM"
}
"""What ``config.json`` says so that transformers loads nothing without ``vllm_moeq.hf``.

It skips a quantization that it does not know, and would go on with random experts. But a name of
weights that is no name of a file is an error, whose message shows it. vLLM does not look there.
"""


def guarded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` with :data:`TRANSFORMERS_GUARD`.

    A language model inside a vision model can be loaded on its own, by its own part of the config.
    """
    result = {**config, **TRANSFORMERS_GUARD}
    if isinstance(config.get("text_config"), Mapping):
        result["text_config"] = {**config["text_config"], **TRANSFORMERS_GUARD}
    return result


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """``quantization_config`` in the ``config.json`` of a packed checkpoint.

    Attributes:
        plan: Group size, and the widths of all experts and dense layers.
    """

    plan: BitPlan

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        plan = self.plan.to_dict()
        linear = to_compressed_tensors(plan.pop("linear_bits"), self.plan.group_size)
        return {"quant_method": QUANT_METHOD, **plan, "linear": linear}

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
        plan = BitPlan.from_dict({**data, "linear_bits": {}})
        linear_bits = from_compressed_tensors(data.get("linear"), plan.group_size)
        return cls(plan=replace(plan, linear_bits=linear_bits))


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
