"""A checkpoint as if it had one 16- or 32-bit tensor for each matrix of each expert.

That is what the packed checkpoint is named after and what everything behind it reads. What is on
disk may be fused, renamed or in lower precision; see ``README.md`` beside this file.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from moeq.checkpoint.families import Family, Matrix, family_of
from moeq.checkpoint.mapped import Index
from moeq.checkpoint.precision import Reading, readings, source_format
from moeq.checkpoint.reader import CheckpointReader, TensorInfo
from moeq.errors import MoeqError

_BLOCK_IN_TRANSFORMERS = "mlp"
"""What transformers 5 calls the MoE block of every family, if it saves a model as it has it."""
_FUSED = r"(?P<matrices>gate_up_proj|down_proj)(\.weight)?"


class CanonicalReader(CheckpointReader):
    """Reads a source: its tensors have canonical names, whatever the files call them.

    Args:
        folder: Holds ``config.json`` and safetensors files.

    Raises:
        MoeqError: A missing or damaged file, or one of no supported model, layout or precision.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        family = family_of(self.config, self.tensors)
        precision = source_format(self.config, folder)
        lowered = readings(self, precision) if precision else {}
        self._readings: dict[str, Reading] = {}
        for name, info in self.tensors.items():
            stored = lowered.get(name, self._as_stored(name, info))
            if stored is None:
                continue
            model_name = _canonical_name(family, name)
            fused = _fused(family, name)
            if fused is None:
                self._add(model_name.replace(".weight_packed", ".weight"), stored)
            elif name in lowered:
                raise MoeqError(
                    f"{folder}: {name} holds all experts of a layer in lower precision; moeq reads "
                    "that from files with one tensor for each expert only"
                )
            else:
                for expert_name, reading in self._experts(family, name, info, *fused):
                    self._add(expert_name, reading)
        self.tensors = {name: reading.info for name, reading in self._readings.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, dequantized and cut out if need be.

        Raises:
            MoeqError: There is no such tensor, or its file has gone; names it.
        """
        self.info(name)
        return self._readings[name].read()

    def _add(self, name: str, reading: Reading) -> None:
        if name in self._readings:
            raise MoeqError(
                f"{self.folder}: {name} is stored twice, fused and on its own or under two names; "
                "which one holds?"
            )
        self._readings[name] = reading

    def _as_stored(self, name: str, info: TensorInfo, index: Index | None = None) -> Reading:
        read: Callable[[], torch.Tensor] = lambda: self.stored(name, info.file, index)  # noqa: E731
        return Reading(info, read)

    def _experts(
        self, family: Family, name: str, info: TensorInfo, container: str, matrices: str
    ) -> Iterator[tuple[str, Reading]]:
        """Yield the matrices in a fused tensor: gate above up [E, 2I, H], or down [E, H, I]."""
        if len(info.shape) != 3 or (matrices == "gate_up_proj" and info.shape[1] % 2):
            raise MoeqError(
                f"{self.folder}: {name} has shape {list(info.shape)}, expected "
                "[experts, 2 * intermediate_size, hidden_size] or "
                "[experts, hidden_size, intermediate_size]"
            )
        experts, rows, columns = info.shape
        parts: tuple[Matrix, ...] = ("gate", "up") if matrices == "gate_up_proj" else ("down",)
        rows //= len(parts)
        part_info = TensorInfo(info.file, info.dtype, (rows, columns))
        for expert in range(experts):
            for number, matrix in enumerate(parts):
                part = slice(number * rows, (number + 1) * rows)
                reading = self._as_stored(name, info, (expert, part))._replace(info=part_info)
                yield f"{container}.{expert}.{getattr(family, matrix)}.weight", reading


def _canonical_name(family: Family, name: str) -> str:
    """Return what a tensor is called where the family has its own name for the MoE block."""
    block = family.experts.split(".")[0]
    return re.sub(rf"(\blayers\.\d+\.){_BLOCK_IN_TRANSFORMERS}\.", rf"\g<1>{block}.", name)


def _fused(family: Family, name: str) -> tuple[str, str] | None:
    """Return the container and the matrices that a fused tensor holds; None if it is no such."""
    container = rf"(?P<container>.*\blayers\.\d+\.{re.escape(family.experts)})"
    match = re.fullmatch(rf"{container}\.{_FUSED}", _canonical_name(family, name))
    return None if match is None else (match["container"], match["matrices"])
