"""Cuts tensors that hold all experts of a layer into a matrix for each."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from moeq.checkpoint.families import Family, Matrix
from moeq.checkpoint.mapped import Index
from moeq.checkpoint.reader import Reading, TensorInfo
from moeq.errors import MoeqError

_DOWN = "down_proj"


class Part(NamedTuple):
    """What a fused tensor holds of one expert.

    Attributes:
        expert: Its number.
        matrix: Which of its matrices.
        kind: ``weight`` or ``bias``.
        reading: How it is read.
    """

    expert: int
    matrix: Matrix
    kind: str
    reading: Reading


class FusedNames:
    """Recognizes the fused tensors of a family: of gate and up, of up without a gate, of down.

    Args:
        family: Whose.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.first = "up_proj" if family.gate is None else "gate_up_proj"
        container = rf"(?P<container>.*\b{family.layer}{re.escape(family.experts)})"
        tensor = rf"(?P<tensor>(?:{self.first}|{_DOWN})(?:_bias)?)"
        self._pattern = re.compile(rf"{container}\.{tensor}(\.weight)?")

    def match(self, name: str) -> tuple[str, str] | None:
        """Return the container and the name in it of a fused tensor; None if it is no such."""
        match = self._pattern.fullmatch(name)
        return None if match is None else (match["container"], match["tensor"])


def experts_in(container: str, fused: Mapping[str, Reading], names: FusedNames) -> Iterator[Part]:
    """Yield the matrices of a layer's fused tensors, and their biases.

    Shapes say whether the tensors are transposed: with a gate no sizes fit both ways.

    Args:
        container: Whose experts they are, for messages.
        fused: Tensors by their names in the container.
        names: Of the family.

    Raises:
        MoeqError: A tensor is missing or one too many, or the shapes do not fit each other.
    """
    family, matrices = names.family, names.family.projections["w13"]
    halves = len(matrices)
    wanted = [names.first, _DOWN]
    wanted += [f"{name}_bias" for name in wanted] if family.biased else []
    for name in wanted:
        if name not in fused:
            raise MoeqError(f"{container} lacks {name}; has the checkpoint been cut short?")
    for name in fused:
        if name not in wanted:
            raise MoeqError(f"{container} has {name}, which experts of this family have not")
    first, down = fused[names.first], fused[_DOWN]
    sizes = _sizes(first.info.shape, down.info.shape, halves)
    if sizes is None:
        factor, or_else = ("2 * ", ", or both transposed") if halves == 2 else ("", "")
        raise MoeqError(
            f"{container} has {names.first} {list(first.info.shape)} and {_DOWN} "
            f"{list(down.info.shape)}, expected {names.first} "
            f"[experts, {factor}intermediate_size, hidden_size] and {_DOWN} "
            f"[experts, hidden_size, intermediate_size]{or_else}"
        )
    experts, hidden_size, intermediate_size, transposed = sizes
    for name, length in zip(wanted[2:], (halves * intermediate_size, hidden_size), strict=False):
        if fused[name].info.shape != (experts, length):
            raise MoeqError(
                f"{container} has {name} {list(fused[name].info.shape)}, expected "
                f"[{experts}, {length}]"
            )
    shape = (intermediate_size, hidden_size)
    for expert in range(experts):
        for number, matrix in enumerate(matrices):
            rows = slice(number * intermediate_size, (number + 1) * intermediate_size)
            if family.interleaved:
                rows = slice(number, None, halves)
            weight = _part(first, expert, rows, shape, transposed)
            yield Part(expert, matrix, "weight", weight)
            if family.biased:
                bias = _part(fused[f"{names.first}_bias"], expert, rows, shape[:1])
                yield Part(expert, matrix, "bias", bias)
        every = slice(None)
        weight = _part(down, expert, every, shape[::-1], transposed)
        yield Part(expert, "down", "weight", weight)
        if family.biased:
            bias = _part(fused[f"{_DOWN}_bias"], expert, every, (hidden_size,))
            yield Part(expert, "down", "bias", bias)


def _sizes(
    first: tuple[int, ...], down: tuple[int, ...], halves: int
) -> tuple[int, int, int, bool] | None:
    """Return experts, hidden_size, intermediate_size and whether a matrix is [inputs, outputs]."""
    if len(first) == len(down) == 3 and first[0] == down[0] and min(down) > 0:
        if first[1:] == (halves * down[2], down[1]):
            return *down, False
        if halves == 2 and first[1:] == (down[2], halves * down[1]):
            return down[0], down[2], down[1], True
    return None


def _part(
    fused: Reading, expert: int, rows: slice, shape: tuple[int, ...], transposed: bool = False
) -> Reading:
    info = TensorInfo(fused.info.file, fused.info.dtype, shape)

    def read(part: Index = ()) -> torch.Tensor:
        if transposed:
            return fused.read((expert,)).T[rows].contiguous()[part]
        return fused.read((expert, rows)).contiguous()[part]

    return Reading(info, read)
