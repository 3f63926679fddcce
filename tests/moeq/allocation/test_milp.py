"""The knapsack with side constraints against every choice there is."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moeq.allocation import milp
from moeq.allocation.constraints import Constraints
from moeq.allocation.milp import solve_constrained
from moeq.allocation.program import Found, Program
from moeq.errors import MoeqError

LAYERS, EXPERTS, WIDTHS = 2, 2, np.array([1, 2, 4])
ITEMS = LAYERS * EXPERTS * 2
ALL = np.stack(np.meshgrid(*[np.arange(len(WIDTHS))] * ITEMS, indexing="ij"), -1).reshape(-1, ITEMS)
"""Every choice [3 ** 8, 8]; items are ordered by layer, expert and projection."""
LAYER = np.array([0, 0, 0, 0, 1, 1, 1, 1])
RANK = np.array([0, 0, 1, 1, 0, 0, 1, 1])
"""Of two ranks, each holds one of the two experts."""

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def _instance(seed: int) -> tuple[npt.NDArray[np.float64], Ints, int]:
    source = np.random.default_rng(seed)
    # A down projection is half as large as gate and up together; 3 bytes are the scales.
    size = np.tile([2, 1], ITEMS // 2)[:, None] * (8 * WIDTHS + 3)
    loss = source.lognormal(0, 2, (ITEMS, 1)) * 3.0**-WIDTHS * source.lognormal(0, 0.5, size.shape)
    if seed % 3 == 1:
        loss -= source.lognormal(-2, 1, size.shape)
    if seed % 3 == 2:
        forbidden = source.random(size.shape) < 0.2
        forbidden[np.arange(ITEMS), source.integers(3, size=ITEMS)] = False
        loss[forbidden] = math.inf
    least = np.where(np.isfinite(loss), size, 10**6).min(axis=1).sum()
    return loss, size, int(source.integers(least, size[:, -1].sum() + 1))


def _sums(taken: Ints, group: Ints) -> Ints:
    return np.stack([taken[:, group == number].sum(axis=1) for number in (0, 1)], axis=1)


def _equal(taken: Ints, group: Ints, tolerance: float) -> Bools:
    sums = _sums(taken, group)
    mean = sums.mean(axis=1, keepdims=True)
    return np.asarray((np.abs(sums - mean) <= tolerance * mean + 1e-9).all(axis=1))


def _few_widths(most: int) -> Bools:
    used = [[len(set(choice[layer == LAYER])) for layer in (0, 1)] for choice in ALL]
    return np.asarray((np.array(used) <= most).all(axis=1))


Holds = Callable[[Ints], Bools]
"""Takes the bytes of each item in every choice, tells which of them fulfil a constraint."""
CASES: dict[str, tuple[dict[str, Any], Holds]] = {
    "layer_bytes": (
        {"layer_bytes": (100, 150)},
        lambda taken: np.asarray((_sums(taken, LAYER) <= [100, 150]).all(axis=1)),
    ),
    "layers_equal": ({"layer_tolerance": 0.0}, lambda taken: _equal(taken, LAYER, 0.0)),
    "layers_alike": ({"layer_tolerance": 0.1}, lambda taken: _equal(taken, LAYER, 0.1)),
    "one_width": ({"widths_per_layer": 1}, lambda taken: _few_widths(1)),
    "two_widths": ({"widths_per_layer": 2}, lambda taken: _few_widths(2)),
    "ranks_equal": ({"ranks": 2}, lambda taken: _equal(taken, RANK, 0.0)),
    "ranks_alike": (
        {"ranks": 2, "rank_tolerance": 0.05},
        lambda taken: _equal(taken, RANK, 0.05),
    ),
    "same_width": (
        {"same_width": True},
        lambda taken: (ALL[:, 0::2] == ALL[:, 1::2]).all(axis=1),
    ),
}
COMBINED = [
    *[(name,) for name in CASES],
    (),
    ("layer_bytes", "two_widths"),
    ("layers_alike", "ranks_alike"),
    ("same_width", "two_widths", "layers_alike"),
    ("layer_bytes", "two_widths", "ranks_equal", "same_width"),
]


@pytest.mark.parametrize("core", [milp._CORE, 2])
@pytest.mark.parametrize("names", COMBINED, ids="+".join)
def test_the_best_of_all_choices_is_found(
    names: tuple[str, ...], core: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milp, "_CORE", core)
    options: dict[str, Any] = {}
    for name in names:
        options |= CASES[name][0]
    infeasible = 0
    for seed in range(9):
        loss, size, budget = _instance(seed)
        taken = np.take_along_axis(size[None], ALL[..., None], axis=2)[..., 0]
        total = np.take_along_axis(loss[None], ALL[..., None], axis=2)[..., 0].sum(axis=1)
        allowed = (taken.sum(axis=1) <= budget) & np.isfinite(total)
        for name in names:
            allowed &= CASES[name][1](taken)
        arguments = (loss, size, budget, (EXPERTS,) * LAYERS, Constraints(**options))
        if not allowed.any():
            infeasible += 1
            with pytest.raises(MoeqError):
                solve_constrained(*arguments, gap=0.0)
            continue
        optimum = float(total[allowed].min())
        solution = solve_constrained(*arguments, gap=0.0)
        assert allowed[(solution.choice == ALL).all(axis=1)].all()
        assert solution.loss == pytest.approx(optimum, rel=1e-6, abs=1e-6)
        assert solution.size == size[np.arange(ITEMS), solution.choice].sum()
        # HiGHS's bound holds to its tolerance.
        assert solution.bound <= optimum + 1e-6 * max(abs(optimum), 1)
        assert solution.bound == pytest.approx(optimum, rel=1e-4, abs=1e-4)
    assert infeasible < 9


def _model(
    layers: int, experts: int, bits: float
) -> tuple[npt.NDArray[np.float64], Ints, int, tuple[int, ...]]:
    source = np.random.default_rng(0)
    widths = np.array([1, 2, 3, 4, 8])
    weights = np.tile([2 * 512 * 1024, 512 * 1024], layers * experts)
    size = weights[:, None] // 8 * widths + weights[:, None] // 128 * 3
    loss = source.lognormal(0, 2, (len(weights), 1)) * 4.0**-widths
    loss *= source.lognormal(0, 0.3, size.shape)
    budget = int(weights.sum() * bits / 8 + weights.sum() // 128 * 3)
    return loss, size, budget, (experts,) * layers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constraints", "gap"),
    [
        (Constraints(layer_tolerance=0.01), 1e-3),
        (Constraints(widths_per_layer=2), 1e-2),
        (Constraints(ranks=4, rank_tolerance=1e-3, layer_tolerance=0.02), 1e-3),
        # No bound that is quick to get is tight here.
        (Constraints(ranks=4, rank_tolerance=1e-3, layer_tolerance=0.02, widths_per_layer=2), 1e-1),
        (Constraints(same_width=True, ranks=4), 1e-3),
    ],
    ids=str,
)
def test_a_larger_model_is_solved_nearly_to_the_bound(constraints: Constraints, gap: float) -> None:
    loss, size, budget, num_experts = _model(8, 32, 2.5)
    solution = solve_constrained(loss, size, budget, num_experts, constraints, gap=gap)
    assert solution.size <= budget
    assert 0 <= solution.gap <= gap
    choice = solution.choice.reshape(8, 32, 2)
    taken = size[np.arange(len(loss)), solution.choice].reshape(8, 32, 2)
    by_layer, by_rank = taken.sum(axis=(1, 2)), taken.reshape(8, 4, 8, 2).sum(axis=(0, 2, 3))
    if constraints.layer_tolerance is not None:
        assert np.ptp(by_layer) <= 2 * constraints.layer_tolerance * by_layer.mean()
    if constraints.ranks > 1:
        assert np.ptp(by_rank) <= 2 * constraints.rank_tolerance * by_rank.mean()
    if constraints.widths_per_layer is not None:
        assert max(len(set(layer.ravel())) for layer in choice) <= constraints.widths_per_layer
    if constraints.same_width:
        assert (choice[..., 0] == choice[..., 1]).all()


def test_side_constraints_cost_nothing_where_they_do_not_bind() -> None:
    loss, size, budget, num_experts = _model(4, 8, 2.5)
    free = solve_constrained(loss, size, budget, num_experts, Constraints(), gap=1e-6)
    slack = Constraints(
        layer_bytes=(budget,) * 4, layer_tolerance=0.99, ranks=2, rank_tolerance=0.99
    )
    loose = solve_constrained(loss, size, budget, num_experts, slack, gap=1e-6)
    assert loose.loss == pytest.approx(free.loss, rel=1e-5)


@pytest.mark.parametrize(("experts", "ranks"), [(8, 4), (60, 8), (7, 3), (3, 4)])
def test_experts_are_dealt_to_ranks_as_vllm_does(experts: int, ranks: int) -> None:
    dealt = Constraints(ranks=ranks).expert_ranks(experts)
    blocks = np.array_split(np.arange(experts), ranks)
    assert [np.flatnonzero(dealt == rank).tolist() for rank in range(ranks)] == [
        block.tolist() for block in blocks
    ]


def test_infeasible_constraints_are_named() -> None:
    loss, size, budget, num_experts = _model(2, 2, 2.5)
    least = int(size[:4, 0].sum())
    constraints = Constraints(layer_bytes=(least - 1, budget), widths_per_layer=2)
    with pytest.raises(MoeqError) as error:
        solve_constrained(loss, size, budget, num_experts, constraints)
    message = str(error.value)
    assert f"at most {budget:,} bytes" in message
    assert f"{least - 1:,} + {budget:,} bytes by layer" in message
    assert "at most 2 different widths in a layer: none exists" in message


def test_an_answer_that_misses_a_constraint_is_not_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss, size, budget, num_experts = _model(2, 2, 2.5)
    largest = Found(np.full(len(loss), 4), 0.0, False)
    monkeypatch.setattr(Program, "solve", lambda *arguments: largest)
    with pytest.raises(MoeqError, match="to the byte; loosen a tolerance"):
        solve_constrained(loss, size, budget, num_experts, Constraints(widths_per_layer=1))


def test_a_budget_that_is_too_small_names_the_smallest_one() -> None:
    loss, size, _, num_experts = _model(2, 2, 2.5)
    least = int(size[:, 0].sum())
    for constraints in (Constraints(), Constraints(same_width=True)):
        with pytest.raises(MoeqError, match=f"at least {least:,} bytes"):
            solve_constrained(loss, size, least - 1, num_experts, constraints)


def test_a_pair_without_a_common_width_is_named() -> None:
    loss, size, budget, num_experts = _model(1, 2, 4)
    loss[2, 1:], loss[3, :1] = math.inf, math.inf
    with pytest.raises(MoeqError, match="no width that both projections of expert 1"):
        solve_constrained(loss, size, budget, num_experts, Constraints(same_width=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_bytes": (1, 2, 3)}, "layer_bytes lists 3 layers, the model has 2"),
        ({"layer_tolerance": -0.1}, "`layer_tolerance` -0.1"),
        ({"layer_tolerance": math.nan}, "`layer_tolerance` nan"),
        ({"rank_tolerance": 1.0}, "`rank_tolerance` 1.0"),
        ({"widths_per_layer": 0}, "`widths_per_layer` 0 must be at least 1"),
        ({"ranks": 0}, "`ranks` 0 must be at least 1"),
    ],
)
def test_bad_constraints_are_named(options: dict[str, Any], message: str) -> None:
    loss, size, budget, num_experts = _model(2, 2, 2.5)
    with pytest.raises(MoeqError, match=re.escape(message)):
        solve_constrained(loss, size, budget, num_experts, Constraints(**options))


def test_experts_that_do_not_match_the_items_are_refused() -> None:
    loss, size, budget, _ = _model(2, 2, 2.5)
    with pytest.raises(MoeqError, match="8 items are not 2 projections of 5 experts"):
        solve_constrained(loss, size, budget, (2, 3), Constraints())


def test_without_time_there_is_an_error_or_a_choice_that_fulfils_all() -> None:
    loss, size, budget, num_experts = _model(8, 32, 2.5)
    constraints = Constraints(layer_tolerance=0.0, ranks=4, widths_per_layer=2)
    try:
        solution = solve_constrained(loss, size, budget, num_experts, constraints, time_limit=0.0)
    except MoeqError as error:
        assert re.search("no plan .* in 0 s; allow more time", str(error))
    else:
        layers = size[np.arange(len(loss)), solution.choice].reshape(8, -1).sum(axis=1)
        assert len(set(layers.tolist())) == 1
