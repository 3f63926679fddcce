"""Between tables of losses, the arrays of a knapsack, and the widths of a plan."""

from collections.abc import Iterator, Mapping

import numpy as np

from moeq.allocation.budget import option_sizes
from moeq.allocation.knapsack import Choice, Loss, Solution, solve
from moeq.errors import MoeqError
from moeq.families import MoELayer
from vllm_moeq.format import PROJECTIONS, LayerBits, Projection

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


def solve_group_sizes(
    tables: Mapping[int, LossTable], layers: list[MoELayer], budget: int, widths: tuple[int, ...]
) -> tuple[int, Solution]:
    """Choose the group size of a whole plan together with its widths.

    Small groups lose less, but their scales take bytes that widths could have.

    Args:
        tables: Losses by group size. Group sizes that do not divide the rows of the model, or
            whose smallest plan is above the budget, are left out.
        layers: MoE layers of the model.
        budget: Bytes of packed experts, for every group size the same.
        widths: Widths to choose from.

    Returns:
        The group size of the least loss (of equal ones the largest) and its solution.

    Raises:
        MoeqError: No group size fits the model or the budget.
    """
    fitting = [group for group in tables if all(_divides(group, layer) for layer in layers)]
    if not fitting:
        layer = layers[0]
        raise MoeqError(
            f"no group size of {', '.join(map(str, sorted(tables)))} divides the rows of all "
            f"layers; {layer.container} has hidden_size {layer.hidden_size} and intermediate_size "
            f"{layer.intermediate_size}"
        )
    solutions: dict[int, Solution] = {}
    for group in sorted(fitting, reverse=True):
        size = option_sizes(layers, group, widths)
        # The largest group takes least bytes: if not even it fits, its error says what would.
        if solutions and size.min(axis=1).sum() > budget:
            continue
        solutions[group] = solve(loss_array(tables[group], layers, widths), size, budget)
    best = min(solutions, key=lambda group: solutions[group].loss)
    return best, solutions[best]


def _divides(group_size: int, layer: MoELayer) -> bool:
    return layer.hidden_size % group_size == 0 and layer.intermediate_size % group_size == 0


def _items(layers: list[MoELayer]) -> Iterator[tuple[str, int, Projection]]:
    """Yield the items of a knapsack in order."""
    for layer in layers:
        for expert in range(layer.num_experts):
            for projection in PROJECTIONS:
                yield layer.container, expert, projection
