"""Rounds experts without any text, while they are written."""

from dataclasses import dataclass

import torch

from moeq.checkpoint.source import SourceModel
from moeq.errors import MoeqError
from moeq.rounding import DATA_FREE


@dataclass(frozen=True, slots=True)
class DataFree:
    """A :class:`moeq.checkpoint.writer.PackedSource` that rounds weights as they are asked for.

    Attributes:
        source: The model.
        method: One of :data:`moeq.rounding.DATA_FREE`.
        group_size: Weights of a row that share a scale.
    """

    source: SourceModel
    method: str
    group_size: int

    def packed(self, weight: str, bits: int) -> dict[str, torch.Tensor]:
        """Round a weight; return its packed tensors by name."""
        try:
            quantized = DATA_FREE[self.method](self.source.tensor(weight), bits, self.group_size)
        except ValueError as error:
            folder = self.source.folder
            raise MoeqError(f"{folder}: cannot quantize {weight}: {error}") from error
        return quantized.named(weight)
