"""Exact-size buffers for one layer's packed experts, and their filling from a checkpoint.

Knows tensor and expert parallelism, but not vLLM: the plugin hangs these buffers on a layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch

from vllm_moeq.format import PROJECTIONS, FormatError, Projection
from vllm_moeq.kernels.layout import ExpertLayout, ExpertWeights

Shard = Literal["w1", "w2", "w3"]
Kind = Literal["weight_packed", "weight_scale", "weight_zero_point"]
KINDS: tuple[Kind, ...] = ("weight_packed", "weight_scale", "weight_zero_point")


def check_group_fits(
    layer: str, group_size: int, hidden_size: int, intermediate_size: int, tp_size: int
) -> None:
    """Check that groups do not straddle rows or tensor-parallel shards.

    Args:
        layer: Name for the message.
        group_size: Weights of a row that share a scale.
        hidden_size: Columns of w13.
        intermediate_size: Columns of w2 over all ranks.
        tp_size: Ranks that share one expert.

    Raises:
        FormatError: They do; says which group size or parallelism works.
    """
    if hidden_size % group_size:
        raise FormatError(
            f"{layer}: group size {group_size} does not divide hidden_size {hidden_size}"
        )
    if intermediate_size % (group_size * tp_size) == 0:
        return
    shard = intermediate_size / tp_size
    # Divisors of tp_size only: into those, attention heads divide too.
    fitting = [
        size
        for size in range(tp_size - 1, 0, -1)
        if tp_size % size == 0 and intermediate_size % (group_size * size) == 0
    ]
    hints = ["--enable-expert-parallel"] if fitting else []
    hints += [f"--tensor-parallel-size {size}" for size in fitting[:1]]
    largest = next(
        (size for size in (128, 64, 32) if intermediate_size % (size * tp_size) == 0), None
    )
    if largest is not None:
        hints.append(f"a checkpoint made with --group-size {largest}")
    raise FormatError(
        f"{layer}: group size {group_size} does not divide the {shard:g} columns of w2 that each "
        f"of {tp_size} tensor-parallel ranks holds (intermediate_size {intermediate_size}). "
        f"What works: {', or '.join(hints) or 'no supported group size'}"
    )


@dataclass(slots=True)
class ExpertBuffers:
    """The packed experts of one layer on one rank.

    Attributes:
        name: Layer name for messages.
        layout: Widths and offsets of the local experts.
        tensors: ``{projection}_{kind}`` to its buffer; shapes as in ``ExpertWeights``.
        tp_rank: This rank among those that share one expert.
        tp_size: Ranks that share one expert.
    """

    name: str
    layout: ExpertLayout
    tp_rank: int = 0
    tp_size: int = 1
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _filled: set[tuple[Kind, Shard, int]] = field(default_factory=set)
    _closed: bool = False

    def __post_init__(self) -> None:
        """Allocate the buffers, not one byte more than the local experts need."""
        experts = len(self.layout.slots)
        for projection in PROJECTIONS:
            rows, columns = self.layout.shape(projection)
            groups = columns // self.layout.group_size
            size = self.layout.buffer_bytes(projection)
            self.tensors |= {
                f"{projection}_weight_packed": torch.empty(size, dtype=torch.uint8),
                f"{projection}_weight_scale": torch.empty(
                    experts, rows, groups, dtype=torch.float16
                ),
                f"{projection}_weight_zero_point": torch.empty(
                    experts, rows, groups, dtype=torch.uint8
                ),
            }

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Checkpoint matrices of an expert: w1 (gate or only), w3 (up, if gated), w2 (down)."""
        return ("w1", "w3", "w2") if self.layout.gated else ("w1", "w2")

    def fill(
        self, kind: Kind, shard: Shard, slot: int, loaded: torch.Tensor, tensor_name: str
    ) -> None:
        """Copy this rank's part of one checkpoint tensor into the expert's place.

        Args:
            kind: Which of the three tensors of a matrix.
            shard: Which matrix.
            slot: Local index of the expert.
            loaded: The whole tensor as it is on disk.
            tensor_name: For messages.

        Raises:
            FormatError: Type or shape differ from what the plan promises, or the experts have no
                such matrix.
        """
        if self._closed:
            raise FormatError(
                f"{self.name}: {tensor_name} comes after loading has ended; moeq checkpoints "
                "cannot be loaded again into a running engine"
            )
        if shard not in self.shards:
            raise FormatError(f"{self.name}: {tensor_name} is {shard} of experts without a gate")
        target = self._view(kind, shard, slot)
        axis = 1 if shard == "w2" else 0
        expected = list(target.shape)
        expected[axis] *= self.tp_size
        if loaded.dtype != target.dtype or list(loaded.shape) != expected:
            bits, _ = self.layout.bits_and_offset(_projection(shard), slot)
            raise FormatError(
                f"{self.name}: {tensor_name} is {loaded.dtype} {list(loaded.shape)}, expected "
                f"{target.dtype} {expected} for {bits} bits and group size "
                f"{self.layout.group_size}: the checkpoint does not follow its own bit plan"
            )
        part = target.shape[axis]
        target.copy_(loaded.narrow(axis, self.tp_rank * part, part))
        self._filled.add((kind, shard, slot))

    def missing(self) -> list[tuple[Kind, Shard, int]]:
        """Return (kind, shard, local slot) of everything that :meth:`fill` has not seen."""
        wanted: Iterable[tuple[Kind, Shard, int]] = (
            (kind, shard, slot)
            for slot in range(len(self.layout.slots))
            for shard in self.shards
            for kind in KINDS
        )
        return [entry for entry in wanted if entry not in self._filled]

    def close(self) -> ExpertWeights:
        """Return the buffers in the order that the kernels take; nothing can be filled any more.

        A kernel may repack them in place, after which the canonical offsets mean nothing.
        """
        self._closed = True
        return ExpertWeights(
            *(self.tensors[f"{projection}_{kind}"] for projection in PROJECTIONS for kind in KINDS)
        )

    def _view(self, kind: Kind, shard: Shard, slot: int) -> torch.Tensor:
        projection = _projection(shard)
        tensor = self.tensors[f"{projection}_{kind}"]
        if kind == "weight_packed":
            offset, size = self.layout.span(projection, slot)
            rows, _ = self.layout.shape(projection)
            matrix = tensor[offset : offset + size].view(rows, -1)
        else:
            matrix = tensor[slot]
        if shard == "w2" or "w3" not in self.shards:
            return matrix
        half = matrix.shape[0] // 2
        return matrix.narrow(0, 0 if shard == "w1" else half, half)


def _projection(shard: Shard) -> Projection:
    return "w2" if shard == "w2" else "w13"
