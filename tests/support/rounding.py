"""Problems of rounding, drawn at random, and what solutions have to hold."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from moeq.rounding.columns import descend_torch, round_columns_torch
from moeq.rounding.grid import largest_code

Descend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int],
    tuple[torch.Tensor, torch.Tensor],
]
"""Takes H, scales, codes, their gradient and the width; returns codes and gradient."""


class Block(NamedTuple):
    """A block of columns of two matrices, with Hessians of columns that depend on each other."""

    factor: torch.Tensor
    wanted: torch.Tensor
    sums: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    @classmethod
    def drawn(cls, columns: int, rows: int, bits: int) -> "Block":
        """Draw it, from a seed of its own for these sizes."""
        source = torch.Generator().manual_seed(columns + rows + bits)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(2, *shape, generator=source)

        factor = normal(columns, columns).triu() / (2 * columns**0.5)
        factor.diagonal(dim1=1, dim2=2).abs_().add_(0.5)
        scale = 3 / largest_code(bits) * (1 + 0.1 * normal(columns, rows).clamp(-3, 3))
        zero = (largest_code(bits) / 2 + normal(columns, rows)).clamp(0, largest_code(bits))
        return cls(factor, normal(columns, rows), normal(columns, rows) / 4, scale, zero)

    def error(self, difference: torch.Tensor) -> torch.Tensor:
        """Return the objective of each row, in float64: of the whole of d R."""
        total = self.sums.double() + self.factor.double().mT @ difference.double()
        return total.square().sum(1)

    def check_rounding(self, codes: torch.Tensor, difference: torch.Tensor, bits: int) -> None:
        """Check what the first loop over columns gave against torch, and judge it in float64."""
        same, expected = round_columns_torch(*self, bits)
        # A sum that is rounded differently may fall on the other side of a tie.
        assert (codes != same).any(1).float().mean() < 0.02
        torch.testing.assert_close(difference, (codes - self.zero) * self.scale - self.wanted)
        assert self.error(difference).sum() <= (1 + 1e-3) * self.error(expected).sum()

    def check_descent(self, descend: Descend, bits: int) -> None:
        """Check the other loop against torch, and judge it in float64."""
        hessian = self.factor @ self.factor.mT
        codes, difference = round_columns_torch(*self, bits)
        gradient = self.factor @ (self.sums + self.factor.mT @ difference)
        ours, slope = descend(hessian, self.scale, codes.clone(), gradient.clone(), bits)
        descend_torch(hessian, self.scale, theirs := codes.clone(), gradient.clone(), bits)
        assert (ours != theirs).any(1).float().mean() < 0.02
        before, after, expected = (
            self.error((chosen - self.zero) * self.scale - self.wanted)
            for chosen in (codes, ours, theirs)
        )
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() <= (1 + 1e-3) * expected.sum()
        change = (ours - codes) * self.scale
        torch.testing.assert_close(slope, gradient + hessian @ change, rtol=1e-4, atol=1e-4)
