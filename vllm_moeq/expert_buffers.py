"""Exact-size buffers for one layer's packed experts, and their filling from a checkpoint.

Knows tensor and expert parallelism, but not vLLM: the plugin hangs these buffers on a layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from vllm_moeq.format import (
    GROUP_SIZES,
    PROJECTIONS,
    FormatError,
    Projection,
    num_groups,
    packed_columns,
)
from vllm_moeq.kernels.layout import ExpertLayout

Shard = Literal["w1", "w2", "w3"]
Kind = Literal["weight_packed", "weight_scale", "weight_zero_point", "bias"]
WEIGHT_KINDS: tuple[Kind, ...] = ("weight_packed", "weight_scale", "weight_zero_point")
WEIGHT_BUFFERS = tuple(
    f"{projection}_{kind}" for projection in PROJECTIONS for kind in WEIGHT_KINDS
)
"""Names of the weights of a layer, in the order of ``ExpertWeights``."""


class Share(NamedTuple):
    """Columns of w2, and as many rows of gate and of up, that a tensor-parallel rank holds.

    Whole groups, so that no rank needs the scales of another. The last group of a row may be short:
    in memory it is filled with zeros, and kernels see whole groups only.

    Attributes:
        start: First column.
        columns: Those that the checkpoint has.
        added: Columns of zeros that follow them.
        whole: Columns of all ranks in the checkpoint.
    """

    start: int
    columns: int
    added: int
    whole: int

    @property
    def size(self) -> int:
        """Columns in memory."""
        return self.columns + self.added

    @classmethod
    def of_rank(
        cls,
        layer: str,
        group_size: int,
        intermediate_size: int,
        tp_rank: int,
        tp_size: int,
    ) -> "Share":
        """Deal the groups out to ranks: the numbers that they get differ by one at most.

        Args:
            layer: Name for the message.
            group_size: Weights of a row that share a scale.
            intermediate_size: Columns of w2 over all ranks.
            tp_rank: This rank.
            tp_size: Ranks that share one expert.

        Raises:
            FormatError: There are fewer groups than ranks; says what works.
        """
        groups = num_groups(intermediate_size, group_size)
        if groups < tp_size:
            raise FormatError(
                f"{layer}: {groups} groups of {group_size} columns of w2 (intermediate_size "
                f"{intermediate_size}) cannot be shared out to {tp_size} tensor-parallel ranks. "
                f"What works: {', or '.join(_hints(group_size, intermediate_size, tp_size))}"
            )
        # The first ranks get one more: the last group may be short.
        first, last = (-(-rank * groups // tp_size) for rank in (tp_rank, tp_rank + 1))
        start, end = first * group_size, min(last * group_size, intermediate_size)
        return cls(start, end - start, last * group_size - end, intermediate_size)


def check_hidden_size(layer: str, group_size: int, hidden_size: int) -> None:
    """Check that rows of gate and up are whole groups.

    Raises:
        FormatError: They are not.
    """
    if hidden_size % group_size:
        raise FormatError(
            f"{layer}: group size {group_size} does not divide hidden_size {hidden_size}"
        )


def _hints(group_size: int, intermediate_size: int, tp_size: int) -> list[str]:
    groups = num_groups(intermediate_size, group_size)
    # Divisors of tp_size only: into those, attention heads divide too.
    size = next(size for size in range(groups, 0, -1) if tp_size % size == 0)
    smaller = [
        group
        for group in reversed(GROUP_SIZES)
        if group < group_size and num_groups(intermediate_size, group) >= tp_size
    ]
    hints = ["--enable-expert-parallel", f"--tensor-parallel-size {size}"]
    return hints + [f"a checkpoint made with --group-size {group}" for group in smaller[:1]]


@dataclass(slots=True)
class ExpertBuffers:
    """The packed experts of one layer on one rank, and what of them is filled.

    The buffers themselves belong to whoever asked :meth:`allocate` for them: when weights are
    loaded again, vLLM brings new ones, and nothing here may keep the old ones alive.

    Attributes:
        name: Layer name for messages.
        layout: Widths and offsets of the local experts.
        share: What of each expert this rank holds.
        biased: Whether each matrix has a bias.
        alternating: Whether gate and up alternate in the rows of w13, instead of being its halves.
    """

    name: str
    layout: ExpertLayout
    share: Share
    biased: bool = False
    alternating: bool = False
    _filled: set[tuple[Kind, Shard, int]] = field(default_factory=set)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Tensors that a matrix has."""
        return (*WEIGHT_KINDS, "bias") if self.biased else WEIGHT_KINDS

    def allocate(self) -> dict[tuple[Projection, Kind], torch.Tensor]:
        """Return uninitialised buffers, not one byte more than the local experts need.

        Weights are as in ``ExpertWeights`` and biases as in ``Biases``, in float32.
        """
        experts = len(self.layout.slots)
        buffers: dict[tuple[Projection, Kind], torch.Tensor] = {}
        for projection in PROJECTIONS:
            rows, columns = self.layout.shape(projection)
            grid = (experts, rows, columns // self.layout.group_size)
            size = self.layout.buffer_bytes(projection)
            buffers[projection, "weight_packed"] = torch.empty(size, dtype=torch.uint8)
            buffers[projection, "weight_scale"] = torch.empty(grid, dtype=torch.float16)
            buffers[projection, "weight_zero_point"] = torch.empty(grid, dtype=torch.uint8)
            if self.biased:
                buffers[projection, "bias"] = torch.empty(experts, rows, dtype=torch.float32)
        return buffers

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Checkpoint matrices of an expert: w1 (gate or only), w3 (up, if gated), w2 (down)."""
        return ("w1", "w3", "w2") if self.layout.gated else ("w1", "w2")

    def fill(
        self,
        buffer: torch.Tensor,
        kind: Kind,
        shard: Shard,
        slot: int,
        loaded: torch.Tensor,
        tensor_name: str,
    ) -> None:
        """Copy this rank's part of one checkpoint tensor into the expert's place.

        Args:
            buffer: That of this kind and matrix, as :meth:`allocate` made it. One on the meta
                device fills nothing: vLLM counts with it what a reload brings.
            kind: Which tensor of a matrix.
            shard: Which matrix.
            slot: Local index of the expert.
            loaded: The whole tensor as it is on disk.
            tensor_name: For messages.

        Raises:
            FormatError: Type or shape differ from what the plan promises, a scale or a bias is no
                finite number, or the experts have no such matrix.
        """
        if shard not in self.shards:
            raise FormatError(
                f"{self.name}: {tensor_name} is {shard} of experts that have {self.shards}"
            )
        target = self._view(buffer, kind, shard, slot)
        bits, _ = self.layout.bits_and_offset(_projection(shard), slot)
        axis = 1 if shard == "w2" else 0
        whole = kind == "bias" and shard == "w2"  # ranks share the columns of w2, not its rows
        expected = list(target.shape)
        if not whole:
            expected[axis] = self._entries(kind, shard, bits, self.share.whole)
        fits = loaded.is_floating_point() if kind == "bias" else loaded.dtype == target.dtype
        if not fits or list(loaded.shape) != expected:
            raise FormatError(
                f"{self.name}: {tensor_name} is {loaded.dtype} {list(loaded.shape)}, expected "
                f"{target.dtype} {expected} for {bits} bits and group size "
                f"{self.layout.group_size}: the checkpoint does not follow its own bit plan, or, "
                "if weights are loaded again, it has another one than the engine was started with"
            )
        if loaded.is_floating_point() and not loaded.isfinite().all():
            raise FormatError(
                f"{self.name}: {tensor_name} holds NaN or infinity. Check the checkpoint with "
                "`moeq verify`, or convert the model again"
            )
        if whole:
            target.copy_(loaded)
            if self.share.start > 0:  # the outputs of all ranks are summed
                target.zero_()
        else:
            start, count = (
                self._entries(kind, shard, bits, columns)
                for columns in (self.share.start, self.share.columns)
            )
            part = loaded.narrow(axis, start, count)
            added = target.shape[axis] - count
            if added:  # zeros: with a scale of zero, gate and up are zero whatever the token
                part = F.pad(part, (0, added) if axis == target.ndim - 1 else (0, 0, 0, added))
            target.copy_(part)
        if not buffer.is_meta:
            self._filled.add((kind, shard, slot))

    def missing(self) -> list[tuple[Kind, Shard, int]]:
        """Return (kind, shard, local slot) of everything that :meth:`fill` has not seen."""
        wanted: Iterable[tuple[Kind, Shard, int]] = (
            (kind, shard, slot)
            for slot in range(len(self.layout.slots))
            for shard in self.shards
            for kind in self.kinds
        )
        return [entry for entry in wanted if entry not in self._filled]

    @property
    def untouched(self) -> bool:
        """Whether nothing has been filled."""
        return not self._filled

    def forget(self) -> None:
        """Count nothing as filled any more: what comes next is another load."""
        self._filled.clear()

    def _entries(self, kind: Kind, shard: Shard, bits: int, columns: int) -> int:
        """Return what so many columns of w2, or rows of gate or up, are in a stored tensor."""
        if shard != "w2":
            return columns
        if kind == "weight_packed":
            return packed_columns(columns, bits)
        return num_groups(columns, self.layout.group_size)

    def _view(self, buffer: torch.Tensor, kind: Kind, shard: Shard, slot: int) -> torch.Tensor:
        if kind == "weight_packed":
            projection = _projection(shard)
            offset, size = self.layout.span(projection, slot)
            rows, _ = self.layout.shape(projection)
            matrix = buffer[offset : offset + size].view(rows, -1)
        else:
            matrix = buffer[slot]
        if shard == "w2" or not self.layout.gated:
            return matrix
        if self.alternating:
            return matrix[0 if shard == "w1" else 1 :: 2]
        half = matrix.shape[0] // 2
        return matrix.narrow(0, 0 if shard == "w1" else half, half)


def _projection(shard: Shard) -> Projection:
    return "w2" if shard == "w2" else "w13"
