"""A checkpoint as if it had one 16- or 32-bit tensor for each matrix of each expert.

That is what the packed checkpoint is named after and what everything behind it reads. What is on
disk may be fused, renamed or in lower precision; see ``README.md`` beside this file.
"""

from functools import partial
from pathlib import Path

import torch

from moeq.checkpoint.families import family_of
from moeq.checkpoint.fused import FusedNames, experts_in
from moeq.checkpoint.precision import logical_name, readings, source_format
from moeq.checkpoint.reader import CheckpointReader, Reading, TensorInfo
from moeq.checkpoint.servable import check_servable, is_left_out
from moeq.errors import MoeqError


class CanonicalReader(CheckpointReader):
    """Reads a source: its tensors have canonical names, whatever the files call them.

    Attributes:
        left_out: Stored names of tensors that would keep vLLM from starting.

    Args:
        folder: Holds ``config.json`` and safetensors files.

    Raises:
        MoeqError: A missing or damaged file, or one of no supported model, layout or precision.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        family = family_of(self.config, self.tensors)
        precision = source_format(self.config, folder)
        check_servable(self.config, folder, self.tensors)
        lowered = readings(self, precision)
        self._readings: dict[str, Reading] = {}
        fused: dict[str, dict[str, Reading]] = {}
        names = FusedNames(family)
        self.left_out = [name for name in self.tensors if is_left_out(self.config, name)]
        for name in self.left_out:
            del self.tensors[name]
        for name, info in self.tensors.items():
            stored = lowered.get(name, self._as_stored(name, info))
            if stored is None:
                continue
            model_name = family.canonical_name(logical_name(name) if name in lowered else name)
            match = names.match(model_name)
            if match is None:
                self._add(model_name, stored)
            else:
                container, tensor = match
                if tensor in fused.setdefault(container, {}):
                    raise self._stored_twice(model_name)
                fused[container][tensor] = stored
        for container, tensors in fused.items():
            for part in experts_in(f"{folder}: {container}", tensors, names):
                expert_name = family.tensor_name(container, part.expert, part.matrix, part.kind)
                self._add(expert_name, part.reading)
        self.tensors = {name: reading.info for name, reading in self._readings.items()}
        self.integers = {
            name: reading.integers
            for name, reading in self._readings.items()
            if reading.integers is not None
        }

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, dequantized and cut out if need be.

        Raises:
            MoeqError: There is no such tensor, or its file has gone; names it.
        """
        self.info(name)
        return self._readings[name].read()

    def _add(self, name: str, reading: Reading) -> None:
        if name in self._readings:
            raise self._stored_twice(name)
        self._readings[name] = reading

    def _stored_twice(self, name: str) -> MoeqError:
        return MoeqError(
            f"{self.folder}: {name} is stored twice, fused and on its own or under two names; "
            "which one holds?"
        )

    def _as_stored(self, name: str, info: TensorInfo) -> Reading:
        return Reading(info, partial(self.stored, name, info.file))
