"""A knapsack with side constraints as a mixed-integer linear program for HiGHS."""

import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeq.allocation.constraints import Groups, Instance
from moeq.allocation.knapsack import Choice, Loss
from moeq.errors import MoeqError

Floats = npt.NDArray[np.float64]
_TIME_LIMIT, _INFEASIBLE = 1, 2


class Found(NamedTuple):
    """What HiGHS found.

    Attributes:
        choice: Option of each item [items], or None.
        bound: No choice has a smaller loss; -inf if HiGHS got no bound.
        out_of_time: Whether it stopped early.
    """

    choice: Choice | None
    bound: float
    out_of_time: bool


class Relaxed(NamedTuple):
    """The solution of the linear relaxation.

    Attributes:
        share: How much of each option is taken [items, widths].
        reduced_cost: By how much the loss of an option is too large to be taken [items, widths].
        loss: Its loss, a lower bound.
    """

    share: Floats
    reduced_cost: Floats
    loss: float


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Minimize cost @ x where lower <= matrix @ x <= upper and 0 <= x <= most.

    The first columns are the options of the items, [items * widths]: 1 if taken. After them come
    the mean bytes of layers and of ranks, and 1 for each width that a layer uses.
    """

    cost: Floats
    matrix: Any
    lower: Floats
    upper: Floats
    most: Floats
    is_integer: npt.NDArray[np.bool_]
    scale: float
    shape: tuple[int, int]

    @classmethod
    def of(cls, instance: Instance, scale: float) -> "Program":
        """Write an instance as a program.

        Args:
            instance: What to solve.
            scale: Losses are multiplied by it: HiGHS's tolerances are absolute (1e-7 and 1e-6).
        """
        allowed = np.isfinite(instance.loss)
        items, widths = allowed.shape
        # Whole numbers as small as possible, for the same reason.
        unit = int(np.gcd.reduce(instance.size, axis=None)) or 1
        size = (instance.size // unit).ravel().astype(np.float64)
        rows = _Rows(np.where(allowed, instance.loss, 0.0).ravel() * scale, allowed.ravel())
        option = np.arange(items * widths)
        layer, rank = np.repeat(instance.layer, widths), np.repeat(instance.rank, widths)
        layers, constraints = instance.num_layers, instance.constraints
        rows.add(option // widths, option, np.ones(len(option)), np.ones(items), np.ones(items))
        rows.add(option * 0, option, size, [-math.inf], [instance.budget // unit])
        if constraints.layer_bytes is not None:
            most = [size // unit for size in constraints.layer_bytes]
            rows.add(layer, option, size, [-math.inf] * layers, most)
        if constraints.layer_tolerance is not None:
            rows.add_equal(layer, layers, size, constraints.layer_tolerance)
        if constraints.ranks > 1:
            rows.add_equal(rank, constraints.ranks, size, constraints.rank_tolerance)
        if constraints.widths_per_layer is not None:
            used = rows.add_columns(layers * widths, 1.0, is_integer=True)
            ones = np.ones(len(option))
            its_width = used[layer * widths + option % widths]
            # One row for each option is a far tighter relaxation than one for each width.
            rows.add(
                np.tile(option, 2),
                np.append(option, its_width),
                np.append(ones, -ones),
                [-math.inf] * len(option),
                [0.0] * len(option),
            )
            rows.add(
                np.repeat(np.arange(layers), widths),
                used,
                np.ones(len(used)),
                [-math.inf] * layers,
                [constraints.widths_per_layer] * layers,
            )
        return rows.program(scale, (items, widths))

    def solve(self, deadline: float, gap: float) -> Found:
        """Search until the relative gap is reached or ``time.monotonic()`` passes the deadline."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        result = milp(
            self.cost,
            integrality=self.is_integer,
            bounds=Bounds(0, self.most),
            constraints=LinearConstraint(self.matrix, self.lower, self.upper),
            options={"time_limit": _seconds_until(deadline), "mip_rel_gap": gap},
        )
        if result.x is None and result.status not in (_TIME_LIMIT, _INFEASIBLE):
            raise MoeqError(f"HiGHS failed: {result.message}")
        bound = -math.inf if result.mip_dual_bound is None else result.mip_dual_bound / self.scale
        choice = None if result.x is None else self._options(result.x).argmax(axis=1)
        return Found(choice, bound, result.status == _TIME_LIMIT)

    def relaxed(self, deadline: float) -> Relaxed | None:
        """Solve the linear relaxation; None if it has no solution or time is over."""
        from scipy.optimize import linprog
        from scipy.sparse import vstack

        fixed = self.lower == self.upper
        above, below = ~fixed & np.isfinite(self.upper), ~fixed & np.isfinite(self.lower)
        result = linprog(
            self.cost,
            A_ub=vstack([self.matrix[above], -self.matrix[below]]),
            b_ub=np.append(self.upper[above], -self.lower[below]),
            A_eq=self.matrix[fixed],
            b_eq=self.lower[fixed],
            bounds=np.stack([np.zeros(len(self.most)), self.most], axis=1),
            options={"time_limit": _seconds_until(deadline)},
        )
        if result.status != 0:
            return None
        reduced = self._options(result.lower.marginals + result.upper.marginals)
        return Relaxed(self._options(result.x), reduced, result.fun / self.scale)

    def _options(self, columns: Floats) -> Floats:
        return columns[: math.prod(self.shape)].reshape(self.shape)


def _seconds_until(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.1)


class _Rows:
    """Collects the columns and rows of a program."""

    def __init__(self, cost: Loss, allowed: npt.NDArray[np.bool_]) -> None:
        self._num_options = len(cost)
        self._cost, self._most = [cost], [allowed.astype(np.float64)]
        self._is_integer = [np.ones(len(cost), np.bool_)]
        self._entries: list[tuple[Groups, Groups, Floats]] = []
        self._lower: list[float] = []
        self._upper: list[float] = []

    def add_columns(self, count: int, most: float, is_integer: bool) -> Groups:
        """Add columns without a cost; return their numbers."""
        first = sum(map(len, self._cost))
        self._cost.append(np.zeros(count))
        self._most.append(np.full(count, most))
        self._is_integer.append(np.full(count, is_integer))
        return np.arange(first, first + count)

    def add(self, row: Groups, column: Groups, value: Floats, lower: Any, upper: Any) -> None:
        """Add rows with limits [rows]; their entries are given by row (from 0), column, value."""
        self._entries.append((row + len(self._lower), column, value))
        self._lower.extend(lower)
        self._upper.extend(upper)

    def add_equal(self, group: Groups, count: int, size: Floats, tolerance: float) -> None:
        """Demand that the sizes of all groups differ from their mean by a share at most."""
        option = np.arange(self._num_options)
        mean = self.add_columns(1, math.inf, is_integer=False)
        self.add(
            np.zeros(len(option) + 1, np.int64),
            np.append(option, mean),
            np.append(size, -float(count)),
            [0.0],
            [0.0],
        )
        row = np.append(group, np.arange(count))
        column = np.append(option, np.repeat(mean, count))
        zero, free = [0.0] * count, [math.inf] * count
        if tolerance == 0:
            limits = [(1.0, zero, zero)]
        else:
            limits = [
                (1 + tolerance, [-math.inf] * count, zero),
                (1 - tolerance, zero, free),
            ]
        for share, lower, upper in limits:
            self.add(row, column, np.append(size, np.full(count, -share)), lower, upper)

    def program(self, scale: float, shape: tuple[int, int]) -> Program:
        """Return what was collected."""
        from scipy.sparse import csr_array

        row, column, value = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        cost = np.concatenate(self._cost)
        return Program(
            cost=cost,
            matrix=csr_array((value, (row, column)), shape=(len(self._lower), len(cost))),
            lower=np.array(self._lower, np.float64),
            upper=np.array(self._upper, np.float64),
            most=np.concatenate(self._most),
            is_integer=np.concatenate(self._is_integer),
            scale=scale,
            shape=shape,
        )
