"""From tables of losses over the arrays of a knapsack to the widths of a plan."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from moeq.allocation.constraints import NO_CONSTRAINTS, Constraints, Instance
from moeq.allocation.knapsack import Choice, Loss, Size, Solution, solve
from moeq.allocation.milp import solve_constrained
from moeq.checkpoint import MoELayer
from moeq.checkpoint.linear import FULL_WIDTH, LinearGroup, linear_bits
from moeq.checkpoint.sizes import option_sizes
from moeq.errors import MoeqError
from vllm_moeq.format import LINEAR_WIDTHS, PROJECTIONS, WIDTHS, BitPlan, LayerBits, Projection

LINEAR_OPTIONS = (*LINEAR_WIDTHS, FULL_WIDTH)
"""Widths that a plan may choose for dense layers."""
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


class LinearChoice(NamedTuple):
    """Dense layers whose widths are chosen with those of the experts, in one budget.

    Attributes:
        groups: Those that have one width.
        losses: By group size, float64 [groups, options] in the order of :data:`LINEAR_OPTIONS`.
    """

    groups: tuple[LinearGroup, ...] = ()
    losses: Mapping[int, Loss] = {}


EXPERTS_ONLY = LinearChoice()


class Allocation(NamedTuple):
    """The widths of a plan.

    Attributes:
        group_size: Weights of a row that share a scale.
        expert_bits: As in a plan.
        linear_bits: Likewise.
        solution: Of the knapsack: experts in the order of :func:`option_sizes`, then dense layers.
    """

    group_size: int
    expert_bits: dict[str, LayerBits]
    linear_bits: dict[str, int]
    solution: Solution


def allocate(
    tables: Mapping[int, LossTable],
    layers: list[MoELayer],
    widths: tuple[int, ...],
    budget: int,
    constraints: Constraints = NO_CONSTRAINTS,
    linear: LinearChoice = EXPERTS_ONLY,
) -> Allocation:
    """Choose the group size of a whole plan and the widths of least total loss in a budget.

    Small groups lose less, but their scales take bytes that widths could have.

    Args:
        tables: Losses of every projection at every width, by group size; one with which there
            is no plan is left out.
        layers: MoE layers of the model.
        widths: Widths to choose from.
        budget: Bytes of packed experts, and of dense layers if their widths are chosen, too; for
            every group size the same.
        constraints: What else must hold for experts.
        linear: Dense layers whose widths are chosen.

    Returns:
        The plan of the least loss; of equal ones that of the largest group size.

    Raises:
        MoeqError: The budget is too small, or nothing fulfils the constraints; says what would.
    """
    arrays = {group: loss_array(table, layers, widths) for group, table in tables.items()}
    solutions = _solutions(arrays, layers, widths, budget, constraints, linear)
    best = min(solutions, key=lambda group: solutions[group].loss)
    choice, items = solutions[best].choice, len(arrays[best])
    chosen = np.array(LINEAR_OPTIONS)[choice[items:]].tolist()
    return Allocation(
        best,
        layer_bits(choice[:items], layers, widths),
        linear_bits(dict(zip(linear.groups, chosen, strict=True))),
        solutions[best],
    )


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
    linear: LinearChoice = EXPERTS_ONLY,
) -> dict[int, Solution]:
    """Return the solution of each group size that has one, the largest first.

    Items are those of experts, and then the groups of dense layers.
    """
    num_experts = tuple(layer.num_experts for layer in layers)
    solutions: dict[int, Solution] = {}
    errors: list[MoeqError] = []
    for group in sorted(arrays, reverse=True):
        loss, size = arrays[group], option_sizes(layers, group, widths)
        try:
            if linear.groups or constraints == NO_CONSTRAINTS:
                both = _stacked(loss, size, linear, group)
                solution = solve(*both, budget)
            if constraints != NO_CONSTRAINTS:  # they are for experts
                left = budget
                if linear.groups:  # keep their bytes for now, and get what experts leave
                    rest, sizes = solution.choice[len(loss) :], _sizes(linear, group)
                    left -= int(sizes[np.arange(len(rest)), rest].sum())
                experts = solve_constrained(loss, size, left, num_experts, constraints)
                if linear.groups:
                    rest = solve(linear.losses[group], sizes, budget - experts.size).choice
                    choice = np.concatenate([experts.choice, rest])
                    experts = Solution.of(*both, choice, solution.bound)
                solution = experts
            solutions[group] = solution
        except MoeqError as error:
            errors.append(error)
    if not solutions:
        raise errors[0]  # of the largest group, which takes least bytes
    return solutions


def _sizes(linear: LinearChoice, group_size: int) -> Size:
    """Return the bytes of dense layers, int64 [groups, options]."""
    sizes = [
        [group.num_bytes(bits, group_size) for bits in LINEAR_OPTIONS] for group in linear.groups
    ]
    return np.array(sizes, np.int64).reshape(len(sizes), len(LINEAR_OPTIONS))


def _stacked(loss: Loss, size: Size, linear: LinearChoice, group_size: int) -> tuple[Loss, Size]:
    """Return losses and sizes of experts [items, widths] with those of dense layers below."""
    if not linear.groups:
        return loss, size
    columns = max(loss.shape[1], len(LINEAR_OPTIONS))

    def padded(values: Loss | Size, by: float) -> Any:
        return np.pad(values, ((0, 0), (0, columns - values.shape[1])), constant_values=by)

    losses = loss, linear.losses[group_size]
    sizes = size, _sizes(linear, group_size)
    return (
        np.concatenate([padded(part, np.inf) for part in losses]),
        np.concatenate([padded(part, 0) for part in sizes]),
    )


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
