"""The multiple-choice knapsack: one option for each item, least total loss, at most so many bytes.

The linear relaxation is solved exactly on the lower convex hulls of the items (Sinha and Zoltners,
"The Multiple-Choice Knapsack Problem", Operations Research 1979; Kellerer, Pferschy and Pisinger,
"Knapsack Problems", 2004, chapter 11). Its multiplier gives a lower bound for every choice; its
whole steps give a choice, which exchanges of two items then bring close to the bound.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeq.errors import MoeqError

Loss = npt.NDArray[np.float64]
Size = npt.NDArray[np.int64]
Choice = npt.NDArray[np.int64]

_MAX_EXCHANGES = 1000
_EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A choice and how good it is at least.

    Attributes:
        choice: Option of each item, int64 [items].
        loss: Total loss of the choice.
        size: Total bytes of the choice.
        bound: No choice that is allowed has a smaller loss than this.
    """

    choice: Choice
    loss: float
    size: int
    bound: float

    @classmethod
    def of(cls, loss: Loss, size: Size, choice: Choice, bound: float) -> "Solution":
        """Add up losses and sizes [items, options] of a choice [items]."""
        items = np.arange(len(choice))
        return cls(
            choice, math.fsum(loss[items, choice]), int(size[items, choice].sum()), float(bound)
        )

    @property
    def gap(self) -> float:
        """Relative gap: (loss - bound) / abs(loss); 0 means that the choice is the best."""
        if self.loss == self.bound:
            return 0.0
        return (self.loss - self.bound) / abs(self.loss) if self.loss else math.inf


def solve(loss: Loss, size: Size, budget: int) -> Solution:
    """Choose one option for each item so that the total loss is small within a budget.

    Losses may be any finite numbers: negative, equal, or larger for larger options.

    Args:
        loss: float64 [items, options]; inf forbids an option.
        size: Bytes, int64 [items, options].
        budget: Bytes that all items may take together.

    Returns:
        A choice with the bound of the Lagrangian dual. It is not always the best one, but with
        thousands of items it is next to it: see its gap. Equal input gives an equal choice.

    Raises:
        MoeqError: A loss that is NaN or -inf, an item without an allowed option, or a budget that
            no choice fits in; names the smallest budget that one does.
    """
    check_instance(loss, size, budget)
    if not len(loss):
        return Solution.of(loss, size, np.empty(0, np.int64), 0.0)
    budget = _reachable(loss, size, budget)
    choice, multiplier = _relaxed(loss, size, budget)
    bound = _dual(loss, size, budget, multiplier)
    choice = _improved(loss, size, budget, choice, bound, multiplier)
    return Solution.of(loss, size, choice, bound)


def check_instance(loss: Loss, size: Size, budget: int) -> None:
    """Check what :func:`solve` takes; raises its errors."""
    if loss.ndim != 2 or loss.shape != size.shape:
        raise MoeqError(
            "losses and sizes must both be [items, options], not "
            f"{list(loss.shape)} and {list(size.shape)}"
        )
    if not np.issubdtype(size.dtype, np.integer):
        raise MoeqError(f"sizes must be whole bytes, not {size.dtype}")
    for name, values, wrong in (
        ("loss", loss, np.isnan(loss) | np.isneginf(loss)),
        ("size", size, size < 0),
    ):
        if wrong.any():
            item, option = np.argwhere(wrong)[0]
            value = "negative" if name == "size" else values[item, option]
            raise MoeqError(f"the {name} of item {item}, option {option} is {value}")
    allowed = np.isfinite(loss)
    if not allowed.any(axis=1).all():
        item = int(np.argmin(allowed.any(axis=1)))
        raise MoeqError(f"item {item} has no allowed option: all its losses are infinite")
    least = int(_smallest(loss, size).sum())
    if least > budget:
        raise MoeqError(
            f"a budget of {budget:,} bytes is too small: the options allowed take at least "
            f"{least:,} bytes"
        )


def _smallest(loss: Loss, size: Size) -> Size:
    """Return the size of the smallest allowed option of each item [items]."""
    smallest: Size = np.where(np.isfinite(loss), size, np.iinfo(np.int64).max).min(axis=1)
    return smallest


def _reachable(loss: Loss, size: Size, budget: int) -> int:
    """Lower a budget to one that totals can meet: sizes often differ by multiples of a unit."""
    smallest = _smallest(loss, size)
    unit = int(np.gcd.reduce((size - smallest[:, None])[np.isfinite(loss)]))
    least = int(smallest.sum())
    return least + (budget - least) // unit * unit if unit else least


class _Hulls(NamedTuple):
    """Lower convex hulls of all items, from the smallest option to the one of least loss.

    Attributes:
        vertices: Options on the hull, in order of size, [items, steps + 1]; the last is repeated.
        rate: Loss saved per byte by each step, [items, steps], falling; 0 where the hull has ended.
    """

    vertices: Choice
    rate: Loss


def _hulls(loss: Loss, size: Size) -> _Hulls:
    items = np.arange(len(loss))
    is_smallest = (size == _smallest(loss, size)[:, None]) & np.isfinite(loss)
    vertices = [np.where(is_smallest, loss, np.inf).argmin(axis=1)]
    rates = []
    for _ in range(loss.shape[1] - 1):
        here = vertices[-1]
        saved = loss[items, here][:, None] - loss
        added = size - size[items, here][:, None]
        rate = np.where((added > 0) & (saved > 0), saved / np.maximum(added, 1), 0.0)
        best = rate.max(axis=1)
        # Of several options on one edge of the hull, its far end.
        there = np.where(rate == best[:, None], added, -1).argmax(axis=1)
        vertices.append(np.where(best > 0, there, here))
        rates.append(best)
    rate = np.array(rates).reshape(-1, len(loss)).T
    # Rounding may make a step of a nearly straight hull better than the one before it.
    return _Hulls(np.stack(vertices, axis=1), np.minimum.accumulate(rate, axis=1))


def _relaxed(loss: Loss, size: Size, budget: int) -> tuple[Choice, float]:
    """Solve the linear relaxation; return its whole steps [items] and its multiplier.

    The relaxation takes the steps of all hulls by loss saved per byte until the budget is full,
    the last one in part; the rate of that one is the multiplier (0 if all steps fit).
    """
    vertices, rate = _hulls(loss, size)
    items, steps = rate.shape
    sizes = np.take_along_axis(size, vertices, axis=1)
    # Stable, so that the steps of an item stay in order and ties go to the first items.
    order = np.argsort(-rate, axis=None, kind="stable")
    order = order[: np.count_nonzero(rate)]
    filled = int(sizes[:, 0].sum()) + np.cumsum(np.diff(sizes, axis=1).ravel()[order])
    taken = int(np.searchsorted(filled, budget, side="right"))
    multiplier = float(rate.ravel()[order[taken]]) if taken < len(order) else 0.0
    steps_taken = np.bincount(order[:taken] // max(steps, 1), minlength=items)
    return vertices[np.arange(items), steps_taken], multiplier


def _dual(loss: Loss, size: Size, budget: int, multiplier: float) -> float:
    """Return the Lagrangian dual: a lower bound for every multiplier that is not negative.

    What float64 may have rounded up is taken off, so that the bound holds exactly.
    """
    if multiplier == 0:
        return math.fsum(loss.min(axis=1))
    terms = (loss + multiplier * size).min(axis=1)
    paid = multiplier * budget
    # |loss| + multiplier * size of the option that is really the least.
    magnitude = math.fsum(np.abs(terms) + 2 * np.maximum(-loss.min(axis=1), 0))
    return math.fsum([*terms, -paid]) - 2 * _EPSILON * (magnitude + paid)


def _improved(
    loss: Loss, size: Size, budget: int, choice: Choice, bound: float, multiplier: float
) -> Choice:
    """Exchange options of one or two items at a time while that lowers the loss.

    An option whose reduced cost is above the gap is in no better choice, so few take part.
    """
    choice = choice.copy()
    items = np.arange(len(loss))
    reduced = loss + multiplier * size
    reduced -= reduced.min(axis=1, keepdims=True)
    for _ in range(_MAX_EXCHANGES):
        now_loss, now_size = loss[items, choice], size[items, choice]
        item, option = np.nonzero(reduced <= math.fsum(now_loss) - bound)
        moves = _best_pair(
            item,
            loss[item, option] - now_loss[item],
            size[item, option] - now_size[item],
            budget - int(now_size.sum()),
        )
        if not moves:
            break
        for move in moves:
            choice[item[move]] = option[move]
    return choice


def _best_pair(item: Choice, loss: Loss, size: Size, slack: int) -> list[int]:
    """Return one or two moves of different items that together save most loss, or none.

    Args:
        item: Whose option a move changes [moves].
        loss: Change of the loss [moves].
        size: Change of the bytes [moves].
        slack: Bytes by which both together may grow.
    """
    # The first one is no move at all; of equal pairs it is in the one that is taken.
    item, loss, size = np.append(-1, item), np.append(0.0, loss), np.append(0, size)
    order = np.lexsort((loss, size))
    # The best partner among the moves up to each size.
    best = np.minimum.accumulate(loss[order])
    is_new = np.append(True, best[1:] < best[:-1])
    partner = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    up_to = np.searchsorted(size[order], slack - size, side="right") - 1
    mate = partner[up_to]
    total = np.where((up_to >= 0) & (item[mate] != item), loss + loss[mate], 0.0)
    move = int(total.argmin())
    if total[move] >= 0:
        return []
    return [chosen - 1 for chosen in (move, int(mate[move])) if chosen > 0]
