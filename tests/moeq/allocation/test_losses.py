"""From a table of losses to arrays, to a choice, to the widths of a plan."""

import itertools
import math

import numpy as np
import pytest

from moeq.allocation import Constraints, solve
from moeq.allocation.budget import bits_budget
from moeq.allocation.losses import (
    LinearChoice,
    LossTable,
    allocate,
    fulfils,
    layer_bits,
    loss_array,
    possible_group_sizes,
)
from moeq.checkpoint import SourceModel
from moeq.checkpoint.families import MoELayer
from moeq.checkpoint.fits import check_plan_fits
from moeq.checkpoint.linear import LinearGroup
from moeq.checkpoint.sizes import option_sizes
from moeq.errors import MoeqError
from support.checkpoints import CONTAINERS, NUM_EXPERTS, write_checkpoint
from vllm_moeq.format import PROJECTIONS, BitPlan

WIDTHS, NONE = (4, 2, 1), Constraints()


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> list[MoELayer]:
    return SourceModel.open(write_checkpoint(tmp_path_factory.mktemp("model"))).layers


def _table(factor: float = 1.0) -> LossTable:
    """Return losses that tell by their digits where they belong."""
    return {
        (container, expert, projection, width): factor
        * (1000 * layer + 100 * expert + 10 * place + 1 / width)
        for layer, container in enumerate(CONTAINERS)
        for expert in range(NUM_EXPERTS)
        for place, projection in enumerate(PROJECTIONS)
        for width in WIDTHS
    }


def test_losses_are_ordered_by_layer_expert_and_projection(layers: list[MoELayer]) -> None:
    loss = loss_array(_table(), layers, WIDTHS)
    assert loss.dtype == np.float64 and loss.shape == (2 * NUM_EXPERTS * 2, 3)
    assert loss[0].tolist() == [0.25, 0.5, 1.0]
    assert loss[1].tolist() == [10.25, 10.5, 11.0]
    assert loss[2 * NUM_EXPERTS + 2 * 3 + 1].tolist() == [1310.25, 1310.5, 1311.0]


def test_a_missing_loss_is_named(layers: list[MoELayer]) -> None:
    table = dict(_table())
    del table[CONTAINERS[1], 2, "w2", 4]
    with pytest.raises(MoeqError, match=rf"w2 of expert 2 of {CONTAINERS[1]} at 4 bits"):
        loss_array(table, layers, WIDTHS)


def test_a_choice_becomes_a_plan_of_its_size_and_loss(layers: list[MoELayer]) -> None:
    source = np.random.default_rng(0)
    table = {key: source.lognormal(0, 2) for key in _table()}
    size, budget = option_sizes(layers, 64, WIDTHS), bits_budget(2.25, layers, 64)
    solution = solve(loss_array(table, layers, WIDTHS), size, budget)
    plan = BitPlan(64, layer_bits(solution.choice, layers, WIDTHS))
    check_plan_fits(plan, layers)
    losses = [
        table[container, expert, projection, bits.width(projection, expert)]
        for container, bits in plan.expert_bits.items()
        for expert in range(NUM_EXPERTS)
        for projection in PROJECTIONS
    ]
    assert solution.loss == pytest.approx(math.fsum(losses))
    rows = {"w13": 2 * 128 * 64, "w2": 64 * 128}
    total = sum(
        rows[projection] * bits.width(projection, expert) // 8 + rows[projection] // 64 * 3
        for bits in plan.expert_bits.values()
        for expert in range(NUM_EXPERTS)
        for projection in PROJECTIONS
    )
    assert solution.size == total <= budget


def test_the_group_size_of_the_least_loss_is_taken(layers: list[MoELayer]) -> None:
    budget = bits_budget(2.25, layers, 64)
    for factors in ({32: 1.0, 64: 0.9}, {32: 0.5, 64: 0.9}, {32: 1.0, 64: 1.0}):
        tables = {group: _table(factor) for group, factor in factors.items()}
        alone = {
            group: solve(
                loss_array(tables[group], layers, WIDTHS),
                option_sizes(layers, group, WIDTHS),
                budget,
            )
            for group in factors
        }
        group, bits, _, solution = allocate(tables, layers, WIDTHS, budget)
        assert solution.loss == min(other.loss for other in alone.values())
        assert solution.choice.tolist() == alone[group].choice.tolist()
        assert bits == layer_bits(solution.choice, layers, WIDTHS)


@pytest.mark.parametrize("constraints", [Constraints(), Constraints(same_width=True)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_dense_layers_share_the_budget(
    share: float, constraints: Constraints, layers: list[MoELayer]
) -> None:
    source = np.random.default_rng(1)
    table = {key: source.lognormal(0, 2) / key[3] ** 3 for key in _table()}
    groups = tuple(
        LinearGroup(index, (f"model.layers.{index}.{name}.weight",), ((64, 64),), 2 * 64 * 64)
        for index in range(2)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    )
    dense = {64: np.array([[10.0, 1.0, 0.0], [0.1, 0.01, 0.0], [3.0, 2.0, 0.0], [0.0] * 3])}
    sizes = [[group.num_bytes(bits, 64) for bits in (4, 8, 16)] for group in groups]
    least = bits_budget(1.5, layers, 64) + sum(size[0] for size in sizes)
    budget = round(least + share * sum(size[2] - size[0] for size in sizes))
    found = allocate({64: table}, layers, WIDTHS, budget, constraints, LinearChoice(groups, dense))
    plan = BitPlan(64, found.expert_bits, linear_bits=found.linear_bits)
    total = sum(
        group.num_bytes(plan.linear_bits.get(group.weights[0].removesuffix(".weight"), 16), 64)
        for group in groups
    )
    items = 2 * NUM_EXPERTS * 2
    assert found.solution.size <= budget
    assert total == sum(sizes[i][option] for i, option in enumerate(found.solution.choice[items:]))
    best = math.inf
    for options in itertools.product(range(3), repeat=4):  # every choice of dense layers
        left = budget - sum(sizes[i][option] for i, option in enumerate(options))
        try:
            experts = allocate({64: table}, layers, WIDTHS, left, constraints).solution
        except MoeqError:
            continue
        lost = sum(dense[64][i, option] for i, option in enumerate(options))
        best = min(best, experts.loss + lost)
    # With constraints, dense layers first get the bytes that they would get without.
    assert best - 1e-9 <= found.solution.loss <= best * (1.001 if constraints == NONE else 1.25)
    assert found.solution.bound <= best + 1e-9


def test_group_sizes_above_the_budget_are_left_out(layers: list[MoELayer]) -> None:
    tables = {64: _table(), 32: _table(0.0)}
    least = int(option_sizes(layers, 64, (1,)).sum())
    group, _, _, solution = allocate(tables, layers, WIDTHS, least)
    assert (group, solution.size) == (64, least)
    with pytest.raises(MoeqError, match=f"at least {least:,} bytes"):
        allocate(tables, layers, WIDTHS, least - 1)


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(ranks=2, rank_tolerance=0.01),
        Constraints(layer_tolerance=0.01),
        Constraints(widths_per_layer=2),
        Constraints(same_width=True),
    ],
)
def test_plans_that_fulfil_constraints_are_told_from_others(
    constraints: Constraints, layers: list[MoELayer]
) -> None:
    source = np.random.default_rng(0)
    tables = {64: {key: source.lognormal(0, 2) / key[3] ** 3 for key in _table()}}
    budget = bits_budget(2.25, layers, 64)
    free, kept = (
        BitPlan(64, allocate(tables, layers, WIDTHS, budget, demanded)[1])
        for demanded in (Constraints(), constraints)
    )
    assert fulfils(kept, layers, constraints)
    assert not fulfils(free, layers, constraints)
    assert fulfils(free, layers, Constraints())


def test_group_sizes_without_a_plan_are_told_before_losses_are_known(
    layers: list[MoELayer],
) -> None:
    budget = int(option_sizes(layers, 32, (1,)).sum())  # too little for 2 bits of either
    possible = Constraints(ranks=2, rank_tolerance=0.01)
    assert possible_group_sizes((32, 64), layers, WIDTHS, budget, possible) == [64, 32]
    assert possible_group_sizes((32, 64), layers, WIDTHS, budget - 1, possible) == [64]
    impossible = Constraints(ranks=3)  # of 4 experts: one rank has two of them
    with pytest.raises(MoeqError, match="3 ranks of equal bytes"):
        possible_group_sizes((32, 64), layers, (4,), bits_budget(4, layers, 32), impossible)


def test_a_group_size_without_a_plan_does_not_spoil_the_others(layers: list[MoELayer]) -> None:
    # Scales of groups of 32 leave no room to make ranks equal, though they fit the budget.
    tables = {64: _table(), 32: _table(0.0)}
    budget = int(option_sizes(layers, 32, (1,)).sum())
    forbidden = {key: math.inf if key[3] == 1 and key[1] == 0 else 0.0 for key in _table()}
    group, _, _, solution = allocate({64: _table(), 32: forbidden}, layers, WIDTHS, budget)
    assert group == 64 and solution.size <= budget
    assert allocate(tables, layers, WIDTHS, budget)[0] == 32
