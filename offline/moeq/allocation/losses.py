"""From tables of losses over the arrays of a knapsack to the widths of a plan."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from moeq.allocation.constraints import NO_CONSTRAINTS, Constraints, Instance
from moeq.allocation.knapsack import Choice, Loss, Solution, solve
from moeq.allocation.milp import solve_constrained
from moeq.checkpoint import MoELayer
from moeq.checkpoint.sizes import option_sizes
from moeq.errors import MoeqError
from vllm_moeq.format import PROJECTIONS, WIDTHS, BitPlan, LayerBits, Projection

LossTable = Mapping[tuple[str, int, Projection, int], float]
"""Loss by (container of the layer, expert, projection, width)."""


def loss_array(table: LossTable, layers: list[MoELayer], widths: tuple[int, ...]) -> Loss:
    """Return losses as float64 [items, widths], in the order of :func:`option_sizes`.

    Args:
        table: A loss for every projection and width; inf forbids a width.
        layers: MoE layers of the model.
        widths: Widths to choose from, the columns.

    Raises:
        MoeqError: A loss is missing; names it.
    """
    try:
        rows = [[table[*item, width] for width in widths] for item in _items(layers)]
    except KeyError as error:
        container, expert, projection, width = error.args[0]
        raise MoeqError(
            f"no loss is known for {projection} of expert {expert} of {container} at {width} bits"
        ) from error
    return np.array(rows, np.float64)


def layer_bits(
    choice: Choice, layers: list[MoELayer], widths: tuple[int, ...]
) -> dict[str, LayerBits]:
    """Return the ``expert_bits`` of a plan from the chosen column of every item [items]."""
    chosen = dict(zip(_items(layers), np.array(widths)[choice].tolist(), strict=True))
    return {
        layer.container: LayerBits(
            **{
                projection: tuple(
                    chosen[layer.container, expert, projection]
                    for expert in range(layer.num_experts)
                )
                for projection in PROJECTIONS
            }
        )
        for layer in layers
    }


def allocate(
    tables: Mapping[int, LossTable],
    layers: list[MoELayer],
    widths: tuple[int, ...],
    budget: int,
    constraints: Constraints = NO_CONSTRAINTS,
) -> tuple[int, dict[str, LayerBits], Solution]:
    """Choose the group size of a whole plan and the widths of least total loss in a budget.

    Small groups lose less, but their scales take bytes that widths could have.

    Args:
        tables: Losses of every projection at every width, by group size; one with which there
            is no plan is left out.
        layers: MoE layers of the model.
        widths: Widths to choose from.
        budget: Bytes of packed experts, for every group size the same.
        constraints: What else must hold.

    Returns:
        The group size of the least loss (of equal ones the largest), its widths and its solution.

    Raises:
        MoeqError: The budget is too small, or nothing fulfils the constraints; says what would.
    """
    arrays = {group: loss_array(table, layers, widths) for group, table in tables.items()}
    solutions = _solutions(arrays, layers, widths, budget, constraints)
    best = min(solutions, key=lambda group: solutions[group].loss)
    return best, layer_bits(solutions[best].choice, layers, widths), solutions[best]


def possible_group_sizes(
    group_sizes: Iterable[int],
    layers: list[MoELayer],
    widths: tuple[int, ...],
    budget: int,
    constraints: Constraints,
) -> list[int]:
    """Return the group sizes with which there is a plan, before losses are measured for hours.

    Raises:
        MoeqError: There is none; says why.
    """
    arrays = {group: np.zeros(option_sizes(layers, group, widths).shape) for group in group_sizes}
    return list(_solutions(arrays, layers, widths, budget, constraints))


def _solutions(
    arrays: Mapping[int, Loss],
    layers: list[MoELayer],
    widths: tuple[int, ...],
    budget: int,
    constraints: Constraints,
) -> dict[int, Solution]:
    """Return the solution of each group size that has one, the largest first."""
    num_experts = tuple(layer.num_experts for layer in layers)
    solutions: dict[int, Solution] = {}
    errors: list[MoeqError] = []
    for group in sorted(arrays, reverse=True):
        size = option_sizes(layers, group, widths)
        try:
            if constraints == NO_CONSTRAINTS:
                solutions[group] = solve(arrays[group], size, budget)
            else:
                solutions[group] = solve_constrained(
                    arrays[group], size, budget, num_experts, constraints
                )
        except MoeqError as error:
            errors.append(error)
    if not solutions:
        raise errors[0]  # of the largest group, which takes least bytes
    return solutions


def fulfils(plan: BitPlan, layers: list[MoELayer], constraints: Constraints) -> bool:
    """Tell whether a plan that was made without constraints fulfils them."""
    bits = [plan.expert_bits[layer.container] for layer in layers]
    if constraints.same_width and any(layer.w13 != layer.w2 for layer in bits):
        return False
    size = option_sizes(layers, plan.group_size, WIDTHS)
    num_experts = tuple(layer.num_experts for layer in layers)
    items = [
        plan.expert_bits[name].width(projection, expert)
        for name, expert, projection in _items(layers)
    ]
    each_item = replace(constraints, same_width=False)
    total = int(size.max(axis=1).sum())
    instance = Instance.of(np.zeros(size.shape), size, total, num_experts, each_item)
    return instance.fulfilled_by(np.array([WIDTHS.index(width) for width in items]))


def _items(layers: list[MoELayer]) -> Iterator[tuple[str, int, Projection]]:
    """Yield the items of a knapsack in order."""
    for layer in layers:
        for expert in range(layer.num_experts):
            for projection in PROJECTIONS:
                yield layer.container, expert, projection
