"""The knapsack with side constraints: relaxations first, then HiGHS."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from moeq.allocation.constraints import Constraints, Instance
from moeq.allocation.knapsack import Choice, Loss, Size, Solution, check_instance, solve
from moeq.allocation.program import Program
from moeq.errors import MoeqError
from vllm_moeq.format import PROJECTIONS

DEFAULT_TIME_LIMIT = 60.0
DEFAULT_GAP = 1e-4
_OBJECTIVE = 1000.0
"""Losses are scaled to about this total, which suits HiGHS's absolute tolerances."""
_CORE = 96
"""Options of a layer that are open in the first search, beside those that the relaxation takes."""
_BISECTIONS = 40


def solve_constrained(
    loss: Loss,
    size: Size,
    budget: int,
    num_experts: tuple[int, ...],
    constraints: Constraints,
    time_limit: float = DEFAULT_TIME_LIMIT,
    gap: float = DEFAULT_GAP,
) -> Solution:
    """Choose a width for each item as :func:`~moeq.allocation.solve` does, under side constraints.

    A large instance is first searched near the solution of its linear relaxation (a core: Kellerer,
    Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 5); the whole follows only if
    the gap is still too large.

    Args:
        loss: float64 [items, widths]; inf forbids a width. Items are ordered by layer, expert and
            projection; a column stands for the same width everywhere.
        size: Bytes, int64 [items, widths].
        budget: Bytes that all items may take together.
        num_experts: Experts of each layer.
        constraints: What else must hold.
        time_limit: Seconds after which the best choice so far is returned. HiGHS looks at the
            clock only now and then, so it may take longer.
        gap: Relative gap at which the search ends.

    Returns:
        A choice with the best bound known, HiGHS's dual bound or that of a relaxation. HiGHS
        computes in float64 with tolerances of about 1e-6, relative; the bound holds to that.

    Raises:
        MoeqError: No choice fulfils the constraints, or none was found in time; names them.
    """
    projections = len(PROJECTIONS)
    if len(loss) != projections * sum(num_experts) or not len(loss):
        raise MoeqError(
            f"{len(loss)} items are not {projections} projections of {sum(num_experts)} experts"
        )
    constraints.check(len(num_experts))
    check_instance(loss, size, budget)
    instance = Instance.of(loss, size, budget, num_experts, constraints)
    impossible = np.isinf(instance.loss).all(axis=1)
    if impossible.any():
        expert = int(impossible.argmax())
        raise MoeqError(f"there is no width that both projections of expert {expert} may have")
    choice, bound = _search(instance, time_limit, gap)
    return Solution.of(loss, size, np.repeat(choice, len(loss) // len(choice)), bound)


def _search(instance: Instance, time_limit: float, gap: float) -> tuple[Choice, float]:
    """Return a choice that fulfils everything and a bound."""
    loss, size = instance.loss, instance.size
    deadline = time.monotonic() + time_limit
    free = solve(loss, size, instance.budget)
    bound = free.bound
    feasible = [free.choice] if instance.fulfilled_by(free.choice) else []
    total = np.abs(loss[np.arange(len(loss)), free.choice]).sum()
    scale = _OBJECTIVE / total if total else 1.0

    def best() -> Solution | None:
        solutions = [Solution.of(loss, size, choice, bound) for choice in feasible]
        return min(solutions, key=lambda solution: solution.loss, default=None)

    def is_done() -> bool:
        solution = best()
        return solution is not None and (solution.gap <= gap or time.monotonic() >= deadline)

    if not is_done() and loss.size > len(loss) + _CORE * instance.num_layers:
        core, core_bound = _core(instance, scale, deadline)
        bound = max(bound, core_bound)
        if core is not None:
            choice = Program.of(core, scale).solve(deadline, gap / 2).choice
            feasible += [choice] if choice is not None and instance.fulfilled_by(choice) else []
    reason = ""
    if not is_done():
        choice, dual, out_of_time = Program.of(instance, scale).solve(deadline, gap)
        bound = max(bound, dual)
        if choice is not None and instance.fulfilled_by(choice):
            feasible.append(choice)
        elif choice is not None:
            reason = "HiGHS found none that fulfils them to the byte; loosen a tolerance"
        elif out_of_time:
            reason = f"none was found in {time_limit:g} s; allow more time or loosen them"
        else:
            reason = "none exists; loosen one of them"
    solution = best()
    if solution is None:
        raise MoeqError(
            f"no plan of at most {instance.budget:,} bytes with {instance.constraints}: {reason}"
        )
    # A bound from float64 may be above the best choice by a rounding error.
    return solution.choice, min(bound, solution.loss)


def _core(instance: Instance, scale: float, deadline: float) -> tuple[Instance | None, float]:
    """Forbid what is far from the linear relaxation; return a bound for the whole, too.

    There may be no core, if the relaxation has no solution or time is over.
    """
    most_widths = instance.constraints.widths_per_layer
    bound = -math.inf
    if most_widths is not None and most_widths < instance.loss.shape[1]:
        loss, bound = _few_widths(instance, most_widths)
        instance = replace(instance, loss=loss)
    # The widths left in each layer are few enough.
    constraints = replace(instance.constraints, widths_per_layer=None)
    instance = replace(instance, constraints=constraints)
    relaxed = Program.of(instance, scale).relaxed(deadline)
    if relaxed is None:
        return None, bound
    if bound == -math.inf:
        bound = relaxed.loss
    distance = np.where(relaxed.share > 0, -1.0, relaxed.reduced_cost)
    distance[np.isinf(instance.loss)] = np.inf
    loss = instance.loss.copy()
    for layer in range(instance.num_layers):
        items = np.flatnonzero(instance.layer == layer)
        order = np.argsort(distance[items], axis=None, kind="stable")
        far = order[len(items) + _CORE :]
        row, width = np.unravel_index(far, (len(items), loss.shape[1]))
        loss[items[row], width] = np.inf
    return replace(instance, loss=loss), bound


def _few_widths(instance: Instance, most_widths: int) -> tuple[Loss, float]:
    """Choose the widths of each layer by the Lagrangian dual of its bytes and of all bytes.

    For given multipliers each layer takes the set of widths with the least loss plus cost; the
    multipliers are bisected until the bytes fit.

    Returns:
        The losses with all other widths forbidden, and the bound of the multipliers.
    """
    loss, size, budget = instance.loss, instance.size, instance.budget
    items, layers = np.arange(len(loss)), np.arange(instance.num_layers)
    starts = np.searchsorted(instance.layer, layers)
    subsets = np.array(list(itertools.combinations(range(loss.shape[1]), most_widths)))

    def taken(multiplier: Loss) -> tuple[Choice, Size, Loss]:
        """Return set, bytes and loss plus cost of each layer, given its multiplier [layers]."""
        cost = loss + multiplier[instance.layer, None] * size
        options = [subset[cost[:, subset].argmin(axis=1)] for subset in subsets]
        costs = np.stack([np.add.reduceat(cost[items, option], starts) for option in options])
        sizes = np.stack([np.add.reduceat(size[items, option], starts) for option in options])
        sets = costs.argmin(axis=0)
        return sets, sizes[sets, layers], costs[sets, layers]

    def bisected(floor: Loss, fits: Callable[[Size], npt.NDArray[np.bool_]]) -> Loss:
        """Return the least multipliers [layers] from a floor on whose bytes [layers] fit."""
        enough = fits(taken(floor)[1])
        high = np.full(len(layers), np.abs(loss[np.isfinite(loss)]).max())
        low = np.maximum(floor, high * 2.0**-100)
        for _ in range(_BISECTIONS):
            middle = np.sqrt(low) * np.sqrt(high)
            fit = fits(taken(middle)[1])
            low, high = np.where(fit, low, middle), np.where(fit, middle, high)
        return np.where(enough, floor, high)

    zero = np.zeros(len(layers))
    common = bisected(zero, lambda taken: np.full(len(layers), taken.sum() <= budget))
    bound = float(taken(common)[2].sum() - common[0] * budget)
    most = _most_bytes(instance)
    if instance.constraints.layer_tolerance is not None:
        common = zero  # their shares bind every layer
    multiplier = bisected(common, lambda taken: taken <= most)
    sets, _, costs = taken(multiplier)
    dual = costs.sum() - common[0] * budget - ((multiplier - common) * most).sum()
    allowed = np.zeros((len(layers), loss.shape[1]), np.bool_)
    allowed[layers[:, None], subsets[sets]] = True
    return np.where(allowed[instance.layer], loss, np.inf), max(bound, float(dual))


def _most_bytes(instance: Instance) -> Loss:
    """Return bytes that no layer may exceed, [layers]."""
    constraints, layers = instance.constraints, instance.num_layers
    most = np.full(layers, float(instance.budget))
    if constraints.layer_bytes is not None:
        most = np.minimum(most, constraints.layer_bytes)
    if constraints.layer_tolerance is not None:
        most = np.minimum(most, (1 + constraints.layer_tolerance) * instance.budget / layers)
    return most
