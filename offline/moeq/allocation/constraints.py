"""What a choice of widths must fulfil beside the budget of bytes."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeq.allocation.knapsack import Choice, Loss, Size
from moeq.errors import MoeqError
from vllm_moeq.format import PROJECTIONS

Groups = npt.NDArray[np.int64]
"""The layer, or the rank, of each item [items]."""


@dataclass(frozen=True, slots=True)
class Constraints:
    """Side constraints, to be combined at will; by default there is none.

    Attributes:
        layer_bytes: Most bytes of each layer.
        layer_tolerance: Every layer takes the mean bytes of all layers, up to this share of them.
        widths_per_layer: Most different widths in a layer.
        ranks: Every expert-parallel rank takes the mean bytes of all ranks, over the whole model.
            Experts are dealt in blocks, as vLLM does by default: rank r of R holds those from
            r * E / R on; where R does not divide E, the first ranks hold one more.
        rank_tolerance: Share of the mean by which a rank may differ.
        same_width: Both projections of an expert have the same width.
    """

    layer_bytes: tuple[int, ...] | None = None
    layer_tolerance: float | None = None
    widths_per_layer: int | None = None
    ranks: int = 1
    rank_tolerance: float = 0.0
    same_width: bool = False

    def check(self, num_layers: int) -> None:
        """Check the values that the type system does not.

        Raises:
            MoeqError: A value without meaning, or another number of layers; names it.
        """
        if self.layer_bytes is not None and len(self.layer_bytes) != num_layers:
            raise MoeqError(
                f"layer_bytes lists {len(self.layer_bytes)} layers, the model has {num_layers}"
            )
        for name in ("layer_tolerance", "rank_tolerance"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise MoeqError(f"`{name}` {share} must be a share such as 0.01, below 1")
        for name in ("widths_per_layer", "ranks"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise MoeqError(f"`{name}` {number} must be at least 1")

    def expert_ranks(self, num_experts: int) -> Groups:
        """Return the rank of each expert of a layer [num_experts]."""
        each, more = divmod(num_experts, self.ranks)
        ranks = np.arange(self.ranks)
        return np.repeat(ranks, np.where(ranks < more, each + 1, each))

    def __str__(self) -> str:
        """Say what is demanded, in words."""
        parts = []
        if self.layer_bytes is not None:
            parts.append(f"at most {' + '.join(f'{b:,}' for b in self.layer_bytes)} bytes by layer")
        if self.layer_tolerance is not None:
            parts.append(f"layers of equal bytes up to {self.layer_tolerance:.2%}")
        if self.widths_per_layer is not None:
            parts.append(f"at most {self.widths_per_layer} different widths in a layer")
        if self.ranks > 1:
            parts.append(f"{self.ranks} ranks of equal bytes up to {self.rank_tolerance:.2%}")
        if self.same_width:
            parts.append("the same width for both projections of an expert")
        return "; ".join(parts) or "no side constraint"


NO_CONSTRAINTS = Constraints()


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """A knapsack with side constraints.

    Attributes:
        loss: float64 [items, widths]; inf forbids a width.
        size: Bytes, int64 [items, widths].
        budget: Bytes that all items may take together.
        layer: Layer of each item, from 0.
        rank: Expert-parallel rank of each item, from 0.
        constraints: What a choice must fulfil, but for ``same_width``: that joins items.
    """

    loss: Loss
    size: Size
    budget: int
    layer: Groups
    rank: Groups
    constraints: Constraints

    @classmethod
    def of(
        cls,
        loss: Loss,
        size: Size,
        budget: int,
        num_experts: tuple[int, ...],
        constraints: Constraints,
    ) -> "Instance":
        """Tell layers and ranks of items that are ordered by layer, expert and projection.

        With ``same_width`` both projections of an expert become one item.
        """
        copies = len(PROJECTIONS) if constraints.same_width else 1
        shape = (-1, copies, loss.shape[1])
        layer = np.repeat(np.arange(len(num_experts)), num_experts)
        rank = np.concatenate([constraints.expert_ranks(experts) for experts in num_experts])
        return cls(
            loss.reshape(shape).sum(axis=1),
            size.reshape(shape).sum(axis=1),
            budget,
            np.repeat(layer, len(PROJECTIONS) // copies),
            np.repeat(rank, len(PROJECTIONS) // copies),
            constraints,
        )

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return int(self.layer[-1]) + 1

    def fulfilled_by(self, choice: Choice) -> bool:
        """Tell whether a choice fulfils everything, in whole bytes."""
        constraints = self.constraints
        items = np.arange(len(choice))
        taken = self.size[items, choice]
        layers = _sums(taken, self.layer, self.num_layers)
        return (
            bool(np.isfinite(self.loss[items, choice]).all())
            and sum(layers) <= self.budget
            and all(
                size <= most
                for size, most in zip(layers, constraints.layer_bytes or layers, strict=True)
            )
            and _equal(layers, constraints.layer_tolerance)
            and _equal(_sums(taken, self.rank, constraints.ranks), constraints.rank_tolerance)
            and all(
                len(set(choice[self.layer == layer])) <= (constraints.widths_per_layer or math.inf)
                for layer in range(self.num_layers)
            )
        )


def _sums(taken: npt.NDArray[np.int64], group: Groups, count: int) -> list[int]:
    return [int(taken[group == number].sum()) for number in range(count)]


def _equal(sizes: list[int], tolerance: float | None) -> bool:
    """Tell whether all differ from their mean by at most a share of it."""
    if tolerance is None:
        return True
    total = sum(sizes)
    # The last term is for a share such as 0.1, which float64 does not hold.
    return all(abs(len(sizes) * size - total) <= total * (tolerance + 1e-12) for size in sizes)
