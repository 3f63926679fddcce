"""Problems of rounding, drawn at random."""

from typing import NamedTuple

import torch

from moeq.rounding.grid import largest_code


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
