"""Dense linear layers at 4 or 8 bits: their layout, and one call as every kernel takes it."""

import struct
from functools import cache
from typing import NamedTuple

import torch

from vllm_moeq.format import GROUP_SIZES, LINEAR_WIDTHS

SYMMETRIC_ZERO_POINT = 128
"""Zero point of a symmetric grid, in units of ``zero_point_unit``: half of the code range."""


class LinearWeight(NamedTuple):
    """Canonical weights of one layer: those of the checkpoint, see ``vllm_moeq.format.linear``.

    A kernel may prepare them in a layout of its own; the number of tensors stays two.

    Attributes:
        packed: int32 [N, K * bits / 32].
        scale: [N, K / group_size], of any floating type.
    """

    packed: torch.Tensor
    scale: torch.Tensor

    def is_exact(self) -> bool:
        """Say whether float16 holds the scales exactly; kernels may round them to it."""
        return torch.equal(self.scale.half().to(self.scale.dtype), self.scale)


class LinearLayout(NamedTuple):
    """Sizes of one layer on this rank; like ``ExpertLayout`` it reaches the op as a tensor.

    Attributes:
        bits: Width of a code.
        group_size: Weights of a row that share a scale.
        rows: Outputs.
        columns: Inputs, in whole groups.
        kernel: Index into the dispatch table of the kernel that the weights were prepared for.
    """

    bits: int
    group_size: int
    rows: int
    columns: int
    kernel: int = -1

    def check(self) -> None:
        """Check that kernels can run it.

        Raises:
            ValueError: Unknown width or group size, or rows that are not whole groups.
        """
        if self.bits not in LINEAR_WIDTHS or self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"{self.bits} bits in groups of {self.group_size}: dense layers have one of "
                f"{LINEAR_WIDTHS} bits in groups of one of {GROUP_SIZES}"
            )
        if self.columns % self.group_size:
            raise ValueError(f"{self.columns} inputs are not whole groups of {self.group_size}")

    def to_tensor(self) -> torch.Tensor:
        """Return the int64 CPU tensor [5] that the op takes."""
        # Explicitly on the CPU: vLLM builds models under a default device.
        return torch.tensor(self, dtype=torch.int64, device="cpu")

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> "LinearLayout":
        """Read :meth:`to_tensor`; remembered by the content."""
        return _read_layout(tensor.numpy().tobytes())


@cache
def _read_layout(content: bytes) -> LinearLayout:
    return LinearLayout(*struct.unpack("=5q", content))


class LinearCall(NamedTuple):
    """Arguments of the op, checked; made by :meth:`from_op`.

    Attributes:
        x: Tokens [..., K] of any floating type; the result [..., N] has the same type.
        weight: As the kernel's ``prepare_linear`` returned it.
        bias: [N], or None.
        layout: Sizes and width.
    """

    x: torch.Tensor
    weight: LinearWeight
    bias: torch.Tensor | None
    layout: LinearLayout

    @classmethod
    def from_op(
        cls,
        x: torch.Tensor,
        packed: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        layout: torch.Tensor,
        rows: int,
    ) -> "LinearCall":
        """Take the arguments in the order of the op's schema.

        Raises:
            ValueError: Sizes that do not belong together; says which. Kernels trust them.
        """
        sizes = LinearLayout.from_tensor(layout)
        if rows != sizes.rows or x.shape[-1] != sizes.columns:
            raise ValueError(
                f"tokens {list(x.shape)} and {rows} outputs do not fit the layout, which has "
                f"{sizes.columns} inputs and {sizes.rows} outputs"
            )
        if bias is not None and list(bias.shape) != [rows]:
            raise ValueError(f"the bias is {list(bias.shape)}, expected {[rows]}")
        return cls(x, LinearWeight(packed, scale), bias, sizes)
