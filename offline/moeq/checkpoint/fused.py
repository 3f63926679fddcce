"""Cuts tensors that hold all experts of a layer into a matrix for each."""

from collections.abc import Iterator, Mapping

import torch

from moeq.checkpoint.families import Matrix
from moeq.checkpoint.mapped import Index
from moeq.checkpoint.reader import Reading, TensorInfo
from moeq.errors import MoeqError

GATE_UP = "gate_up_proj"
DOWN = "down_proj"
_LAYOUTS = (
    f"{GATE_UP} [experts, 2 * intermediate_size, hidden_size] beside "
    f"{DOWN} [experts, hidden_size, intermediate_size], or both transposed"
)


def experts_in(
    container: str, fused: Mapping[str, Reading]
) -> Iterator[tuple[int, Matrix, Reading]]:
    """Yield the matrices of fused tensors: (expert, matrix, how it is read).

    Shapes say whether the tensors are transposed: no sizes fit both ways.

    Args:
        container: Whose experts they are, for messages.
        fused: ``gate_up_proj``, whose first half is gate, and ``down_proj``.

    Raises:
        MoeqError: One of them is missing, or the shapes do not fit each other.
    """
    for name in (GATE_UP, DOWN):
        if name not in fused:
            raise MoeqError(f"{container} lacks {name}; has the checkpoint been cut short?")
    gate_up, down = fused[GATE_UP], fused[DOWN]
    transposed = _transposed(gate_up.info.shape, down.info.shape)
    if transposed is None:
        raise MoeqError(
            f"{container} has {GATE_UP} {list(gate_up.info.shape)} and {DOWN} "
            f"{list(down.info.shape)}, expected {_LAYOUTS}"
        )
    experts, *matrix = down.info.shape
    hidden_size, intermediate_size = reversed(matrix) if transposed else matrix
    halves = slice(0, intermediate_size), slice(intermediate_size, 2 * intermediate_size)
    for expert in range(experts):
        parts: tuple[tuple[Matrix, Reading, slice | None], ...] = (
            ("gate", gate_up, halves[0]), ("up", gate_up, halves[1]), ("down", down, None),
        )  # fmt: skip
        for name, tensor, rows in parts:
            shape = (hidden_size, intermediate_size)
            info = tensor.info._replace(shape=shape if name == "down" else shape[::-1])
            yield expert, name, _part(tensor, info, expert, rows, transposed)


def _transposed(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
    """Say whether matrices are stored [inputs, outputs]; None if the shapes are no experts'."""
    if len(gate_up) == len(down) == 3 and gate_up[0] == down[0]:
        if gate_up[1:] == (2 * down[2], down[1]):
            return False
        if gate_up[1:] == (down[2], 2 * down[1]):
            return True
    return None


def _part(
    tensor: Reading, info: TensorInfo, expert: int, rows: slice | None, transposed: bool
) -> Reading:
    every = slice(None)
    index: Index = (expert, every if rows is None else rows)
    if transposed:
        index = (expert, every, index[1])

    def read(part: Index | None = None) -> torch.Tensor:
        matrix = tensor.read(index)
        matrix = matrix.T.contiguous() if transposed else matrix
        return matrix if part is None else matrix[part]

    return Reading(info, read)
