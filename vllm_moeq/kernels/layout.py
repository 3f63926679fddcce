"""How the experts of one layer lie in memory."""

import struct
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch

from vllm_moeq.format import GROUP_SIZES, Projection, packed_columns

LAYOUT_HEADER_ROWS = 2
"""Rows of the tensor form before those of the experts."""


class ExpertSlot(NamedTuple):
    """One local expert: widths and byte offsets into the flat packed buffers."""

    w13_bits: int
    w13_offset: int
    w2_bits: int
    w2_offset: int


class ExpertWeights(NamedTuple):
    """Canonical weights of one layer's local experts.

    ``*_packed`` holds the packed rows of all experts one after another, each at its own width;
    nothing is padded to the widest expert. Shapes, with E local experts, N rows and K columns:

    * packed: uint8 [sum over experts of N * K * bits / 8]
    * scale: float16 [E, N, K / group_size]
    * zero_point: uint8 [E, N, K / group_size], in units of ``zero_point_unit(bits)``

    A kernel may prepare them in a layout of its own; the number of tensors stays six, since a
    compiled graph does not know which kernel runs.
    """

    w13_packed: torch.Tensor
    w13_scale: torch.Tensor
    w13_zero_point: torch.Tensor
    w2_packed: torch.Tensor
    w2_scale: torch.Tensor
    w2_zero_point: torch.Tensor


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes of one layer on this rank.

    It reaches the op as an int64 CPU tensor, never as Python numbers: vLLM's compile cache does
    not know the bit plan, so a plan baked into a compiled graph would be reused for another one.

    Attributes:
        group_size: Weights of a row that share a scale.
        hidden_size: Columns of w13 and rows of w2.
        intermediate_size: Columns of w2 on this rank, in whole groups.
        w13_rows: Rows of w13 on this rank: twice ``intermediate_size`` for gated experts.
        slots: Widths and offsets of the local experts.
        kernel: Index into the dispatch table of the kernel that the weights were prepared for; -1
            is the last, the reference, which takes canonical weights.
    """

    group_size: int
    hidden_size: int
    intermediate_size: int
    w13_rows: int
    slots: tuple[ExpertSlot, ...]
    kernel: int = -1

    @classmethod
    def build(
        cls,
        *,
        w13_bits: list[int],
        w2_bits: list[int],
        group_size: int,
        hidden_size: int,
        intermediate_size: int,
        gated: bool = True,
    ) -> "ExpertLayout":
        """Lay out experts of the given widths one after another."""
        w13_rows = intermediate_size * (2 if gated else 1)
        slots = []
        w13_offset = w2_offset = 0
        for first, second in zip(w13_bits, w2_bits, strict=True):
            slots.append(ExpertSlot(first, w13_offset, second, w2_offset))
            w13_offset += w13_rows * packed_columns(hidden_size, first)
            w2_offset += hidden_size * packed_columns(intermediate_size, second)
        return cls(group_size, hidden_size, intermediate_size, w13_rows, tuple(slots))

    @property
    def gated(self) -> bool:
        """Whether w13 holds gate and up."""
        return self.w13_rows == 2 * self.intermediate_size

    @cached_property
    def widths(self) -> dict[Projection, frozenset[int]]:
        """Widths that the experts have in each projection."""
        return {
            "w13": frozenset(slot.w13_bits for slot in self.slots),
            "w2": frozenset(slot.w2_bits for slot in self.slots),
        }

    def shape(self, projection: Projection) -> tuple[int, int]:
        """Return (rows, columns) of one expert's matrix."""
        if projection == "w13":
            return self.w13_rows, self.hidden_size
        return self.hidden_size, self.intermediate_size

    def span(self, projection: Projection, slot: int) -> tuple[int, int]:
        """Return (offset, bytes) of one expert in the flat packed buffer."""
        rows, columns = self.shape(projection)
        bits, offset = self.bits_and_offset(projection, slot)
        return offset, rows * packed_columns(columns, bits)

    def bits_and_offset(self, projection: Projection, slot: int) -> tuple[int, int]:
        """Return the width of one expert and its offset in the flat packed buffer."""
        entry = self.slots[slot]
        if projection == "w13":
            return entry.w13_bits, entry.w13_offset
        return entry.w2_bits, entry.w2_offset

    def buffer_bytes(self, projection: Projection) -> int:
        """Return the size of the flat packed buffer."""
        return sum(self.span(projection, slot)[1] for slot in range(len(self.slots)))

    def check(self, weights: ExpertWeights) -> None:
        """Check canonical weights, whose memory kernels read as the layout says.

        Raises:
            ValueError: Their sizes or types are not those of the layout, or it has unknown ones.
        """
        parts: tuple[tuple[Projection, tuple[torch.Tensor, ...]], ...] = (
            ("w13", weights[:3]),
            ("w2", weights[3:]),
        )
        for projection, actual in parts:
            rows, columns = self.shape(projection)
            if self.group_size not in GROUP_SIZES or columns % self.group_size:
                raise ValueError(f"{columns} columns in groups of {self.group_size}")
            end = 0
            for slot in range(len(self.slots)):
                offset, size = self.span(projection, slot)
                if offset != end:
                    raise ValueError(f"expert {slot} of {projection} lies at {offset}, not {end}")
                end += size
            groups = (len(self.slots), rows, columns // self.group_size)
            wanted = ((torch.uint8, (end,)), (torch.float16, groups), (torch.uint8, groups))
            if tuple((tensor.dtype, tuple(tensor.shape)) for tensor in actual) != wanted:
                raise ValueError(
                    f"weights of {projection} are {[list(tensor.shape) for tensor in actual]}, the "
                    f"layout says {[list(shape) for _, shape in wanted]}"
                )

    def to_tensor(self) -> torch.Tensor:
        """Return the int64 CPU tensor [2 + E, 4] that the op takes."""
        header = [
            (self.kernel, self.group_size, self.hidden_size, self.intermediate_size),
            (self.w13_rows, 0, 0, 0),
        ]
        # Explicitly on the CPU: vLLM builds models under a default device.
        return torch.tensor([*header, *self.slots], dtype=torch.int64, device="cpu")

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> "ExpertLayout":
        """Read :meth:`to_tensor`.

        The op does so with every call. What was read is remembered by the content: copies of a
        tensor share it, and a tensor that was written to is read anew.
        """
        return _read_layout(tensor.numpy().tobytes())


@cache
def _read_layout(content: bytes) -> ExpertLayout:
    rows = list(struct.iter_unpack("=4q", content))
    kernel, group_size, hidden_size, intermediate_size = rows[0]
    slots = tuple(ExpertSlot(*row) for row in rows[LAYOUT_HEADER_ROWS:])
    return ExpertLayout(group_size, hidden_size, intermediate_size, rows[1][0], slots, kernel)
