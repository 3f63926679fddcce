"""Exact-size buffers for one layer's packed experts, and their filling from a checkpoint.

Knows tensor and expert parallelism, but not vLLM: the plugin hangs these buffers on a layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch

from vllm_moeq.format import PROJECTIONS, FormatError, Projection
from vllm_moeq.kernels.layout import ExpertLayout

Shard = Literal["w1", "w2", "w3"]
Kind = Literal["weight_packed", "weight_scale", "weight_zero_point", "bias"]


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
    """The packed experts of one layer on one rank, and what of them is filled.

    The buffers themselves belong to whoever asked :meth:`allocate` for them: when weights are
    loaded again, vLLM brings new ones, and nothing here may keep the old ones alive.

    Attributes:
        name: Layer name for messages.
        layout: Widths and offsets of the local experts.
        tp_rank: This rank among those that share one expert.
        tp_size: Ranks that share one expert.
        biased: Whether each matrix has a bias.
        alternating: Whether gate and up alternate in the rows of w13, instead of being its halves.
    """

    name: str
    layout: ExpertLayout
    tp_rank: int = 0
    tp_size: int = 1
    biased: bool = False
    alternating: bool = False
    _filled: set[tuple[Kind, Shard, int]] = field(default_factory=set)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Tensors that a matrix has."""
        weights: tuple[Kind, ...] = ("weight_packed", "weight_scale", "weight_zero_point")
        return (*weights, "bias") if self.biased else weights

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
            FormatError: Type or shape differ from what the plan promises, or the experts have no
                such matrix.
        """
        if shard not in self.shards:
            raise FormatError(
                f"{self.name}: {tensor_name} is {shard} of experts that have {self.shards}"
            )
        target = self._view(buffer, kind, shard, slot)
        axis = 1 if shard == "w2" else 0
        whole = kind == "bias" and shard == "w2"  # ranks share the columns of w2, not its rows
        expected = list(target.shape)
        if not whole:
            expected[axis] *= self.tp_size
        fits = loaded.is_floating_point() if kind == "bias" else loaded.dtype == target.dtype
        if not fits or list(loaded.shape) != expected:
            bits, _ = self.layout.bits_and_offset(_projection(shard), slot)
            raise FormatError(
                f"{self.name}: {tensor_name} is {loaded.dtype} {list(loaded.shape)}, expected "
                f"{target.dtype} {expected} for {bits} bits and group size "
                f"{self.layout.group_size}: the checkpoint does not follow its own bit plan, or, "
                "if weights are loaded again, it has another one than the engine was started with"
            )
        if whole:
            target.copy_(loaded)
            if self.tp_rank > 0:  # the outputs of all ranks are summed
                target.zero_()
        else:
            part = target.shape[axis]
            target.copy_(loaded.narrow(axis, self.tp_rank * part, part))
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
