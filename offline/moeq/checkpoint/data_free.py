"""Rounds weights without any text, while they are written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moeq.checkpoint.source import SourceModel
from moeq.errors import MoeqError
from moeq.rounding import DATA_FREE, round_linear


@dataclass(frozen=True, slots=True)
class DataFree:
    """A :class:`moeq.checkpoint.writer.PackedSource` that rounds weights as they are asked for.

    Attributes:
        source: The model.
        method: Of experts, one of :data:`moeq.rounding.DATA_FREE`.
        group_size: Weights of a row that share a scale.
    """

    source: SourceModel
    method: str
    group_size: int

    def packed(self, weight: str, bits: int) -> dict[str, torch.Tensor]:
        """Round an expert's weight; return its packed tensors by name."""
        quantize = DATA_FREE[self.method]
        with _named(self.source, weight):
            return quantize(self.source.tensor(weight), bits, self.group_size).named(weight)

    def packed_linear(self, weight: str, bits: int) -> dict[str, torch.Tensor]:
        """Round the weight of a dense layer; return its packed tensors by name."""
        with _named(self.source, weight):
            return round_linear(self.source.tensor(weight), bits, self.group_size).named(weight)


@contextmanager
def _named(source: SourceModel, weight: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise MoeqError(f"{source.folder}: cannot quantize {weight}: {error}") from error
