"""A packed checkpoint as if its dense layers were not: experts stay packed."""

from pathlib import Path

import torch

from moeq.checkpoint.linear import linear_widths
from moeq.checkpoint.reader import CheckpointReader, TensorInfo
from moeq.checkpoint.verify import read_plan
from moeq.errors import MoeqError
from moeq.rounding import LinearWeight


class PackedReader(CheckpointReader):
    """Reads a packed checkpoint; weights of dense layers come dequantized, in float32.

    Attributes:
        plan: Its widths.

    Args:
        folder: Of the checkpoint.

    Raises:
        MoeqError: A missing or damaged file or tensor, or no packed checkpoint; names it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.plan = read_plan(self)
        self._linear: dict[str, tuple[int, list[tuple[str, str]]]] = {}
        for weight, bits in linear_widths(self.plan).items():
            files = [(name, self.info(name).file) for name in LinearWeight.names(weight)]
            shape = tuple(self.stored(*files[-1]).tolist())
            if len(shape) != 2:
                raise MoeqError(f"{folder}: {files[-1][0]} is {list(shape)}, no rows and columns")
            self._linear[weight] = bits, files
            for name, _ in files:
                del self.tensors[name]
            self.tensors[weight] = TensorInfo(files[0][1], "F32", shape)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, dequantized if it is the weight of a dense layer.

        Raises:
            MoeqError: There is no such tensor, or its file has gone; names it.
        """
        if name not in self._linear:
            return super().tensor(name)
        bits, files = self._linear[name]
        return LinearWeight(*(self.stored(*file) for file in files)).dequantize(bits)
