"""The knapsack solver against every choice there is, and on an instance of a real model's size."""

import itertools
import math
import re

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import linprog

from moeq.allocation.knapsack import solve
from moeq.errors import MoeqError

Loss = npt.NDArray[np.float64]
Size = npt.NDArray[np.int64]


def best_of_all(loss: Loss, size: Size, budget: int) -> float:
    """Return the least loss of any choice within the budget; inf if there is none."""
    items = [
        list(zip(map(float, a), map(int, b), strict=True)) for a, b in zip(loss, size, strict=True)
    ]
    best = math.inf
    for options in itertools.product(*items):
        if sum(s for _, s in options) <= budget:
            best = min(best, math.fsum(value for value, _ in options))
    return best


def _smallest(loss: Loss, size: Size) -> int:
    return sum(
        min(int(s) for value, s in zip(*item, strict=True) if value < math.inf)
        for item in zip(loss, size, strict=True)
    )


def _instances(kind: str, count: int = 60) -> list[tuple[Loss, Size, int]]:
    source = np.random.default_rng([ord(letter) for letter in kind])
    instances = []
    for _ in range(count):
        items, options = int(source.integers(1, 6)), int(source.integers(1, 6))
        size = source.integers(0, 30, (items, options))
        if kind == "convex":  # like widths: larger options, falling loss
            size = np.sort(size, axis=1)
            loss = source.lognormal(0, 3, (items, 1)) * 4.0 ** -size.astype(float)
        elif kind == "any":
            loss = source.normal(size=(items, options)) * 10.0 ** source.integers(-6, 6, (items, 1))
        elif kind == "ties":
            loss = source.integers(-2, 3, (items, options)).astype(float)
            size = source.integers(0, 4, (items, options))
        elif kind == "zero":
            loss = np.zeros((items, options))
        elif kind == "negative":
            loss = -source.lognormal(0, 3, (items, options))
        else:
            loss = source.lognormal(0, 3, (items, options))
            loss[source.random(loss.shape) < 0.4] = math.inf
            loss[np.arange(items), source.integers(options, size=items)] = 1.0
        least, most = _smallest(loss, size), int(size.max(axis=1).sum())
        instances.append((loss, size, int(source.integers(least, max(least, most) + 2))))
    return instances


KINDS = ("convex", "any", "ties", "zero", "negative", "forbidden")


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_lies_between_bound_and_solution(kind: str) -> None:
    excess = 0.0
    for loss, size, budget in _instances(kind):
        solution = solve(loss, size, budget)
        optimum = best_of_all(loss, size, budget)
        rows = np.arange(len(loss))
        assert solution.loss == math.fsum(loss[rows, solution.choice])
        assert solution.size == size[rows, solution.choice].sum() <= budget
        assert solution.bound <= optimum <= solution.loss
        assert solution.gap >= 0
        excess += solution.loss > optimum + 1e-12 * abs(optimum)
    # A heuristic, but one that nearly always finds the best of a few items.
    assert excess <= 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_no_worse_than_the_linear_relaxation(kind: str) -> None:
    for loss, size, budget in _instances(kind, 20):
        items, options = loss.shape
        one_each = np.kron(np.eye(items), np.ones(options))
        allowed = np.isfinite(loss).ravel()
        scale = np.abs(loss[np.isfinite(loss)]).max() or 1.0
        relaxed = linprog(
            np.where(allowed, loss.ravel(), 0) / scale,
            A_ub=size.reshape(1, -1),
            b_ub=[budget],
            A_eq=one_each,
            b_eq=np.ones(items),
            bounds=[(0, 1 if free else 0) for free in allowed],
        )
        # HiGHS is exact to about 1e-7.
        assert solve(loss, size, budget).bound / scale >= relaxed.fun - 1e-6


def test_everything_fits_in_a_large_budget_at_the_least_loss() -> None:
    for kind in KINDS:
        for loss, size, _ in _instances(kind, 10):
            solution = solve(loss, size, int(size.sum()))
            assert solution.loss == solution.bound == math.fsum(loss.min(axis=1))
            assert solution.gap == 0


def test_the_smallest_budget_that_is_named_is_enough() -> None:
    for loss, size, _ in _instances("forbidden"):
        least = _smallest(loss, size)
        assert solve(loss, size, least).size == least
        with pytest.raises(MoeqError, match=f"at least {least:,} bytes") as error:
            solve(loss, size, least - 1)
        assert f"{least - 1:,}" in str(error.value)


def qwen3(bits: float, seed: int = 0) -> tuple[Loss, Size, int]:
    """Return an instance of Qwen3-30B-A3B's size: 48 layers, 128 experts, group size 128."""
    source = np.random.default_rng(seed)
    widths = np.array([1, 2, 3, 4, 8])
    weights = np.tile([2 * 768 * 2048, 2048 * 768], 48 * 128)
    size = weights[:, None] // 8 * widths + weights[:, None] // 128 * 3
    # Error falls by about four for each bit, but not for every expert alike.
    noise = source.lognormal(0, 0.3, size.shape)
    loss = source.lognormal(0, 2.5, (len(weights), 1)) * 4.0**-widths * noise
    return loss, size, int(weights.sum() * bits / 8 + weights.sum() // 128 * 3)


@pytest.mark.parametrize("bits", [1.5, 2.25, 2.5, 3.1, 4.7])
def test_a_large_model_is_solved_to_a_tiny_certified_gap(bits: float) -> None:
    loss, size, budget = qwen3(bits)
    solution = solve(loss, size, budget)
    assert solution.size <= budget
    assert solution.loss == pytest.approx(loss[np.arange(len(loss)), solution.choice].sum())
    assert 0 <= solution.loss - solution.bound <= 1e-6 * solution.loss


def test_many_sizes_are_solved_to_a_small_gap() -> None:
    source = np.random.default_rng(1)
    size = source.integers(1, 10**9, (5000, 6))
    loss = source.lognormal(0, 3, size.shape) - 1
    solution = solve(loss, size, int(size.sum() * 0.1))
    assert solution.gap <= 1e-4


def test_ties_are_broken_the_same_way_each_time() -> None:
    loss, size = np.ones((6, 3)) * [3, 2, 1], np.ones((6, 3), np.int64) * np.array([1, 2, 3])
    choice = solve(loss, size, 11).choice
    assert choice.tolist() == solve(loss, size, 11).choice.tolist()
    # Equal items: the first ones get more.
    assert choice.tolist() == sorted(choice, reverse=True)


def test_a_smaller_option_is_taken_where_a_larger_one_is_no_better() -> None:
    solution = solve(np.array([[2.0, 2.0, 2.0]]), np.array([[5, 3, 4]]), 9)
    assert (solution.choice.tolist(), solution.size) == ([1], 3)


def test_no_items_need_no_bytes() -> None:
    solution = solve(np.empty((0, 5)), np.empty((0, 5), np.int64), 0)
    assert (solution.loss, solution.size, solution.bound, solution.gap) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("loss", "size", "message"),
    [
        ([[1.0, math.nan]], [[1, 2]], "loss of item 0, option 1 is nan"),
        ([[1.0, 2.0], [-math.inf, 1]], [[1, 2], [1, 2]], "loss of item 1, option 0 is -inf"),
        ([[1.0], [math.inf]], [[1], [1]], "item 1 has no allowed option"),
        ([[1.0, 2.0]], [[1, -2]], "size of item 0, option 1 is negative"),
        ([[1.0, 2.0]], [[1]], "[1, 2] and [1, 1]"),
        ([1.0, 2.0], [1, 2], "[2] and [2]"),
        ([[1.0, 2.0]], [[1.0, 2.0]], "whole bytes"),
    ],
)
def test_bad_input_is_named(loss: list[object], size: list[object], message: str) -> None:
    with pytest.raises(MoeqError, match=re.escape(message)):
        solve(np.array(loss), np.array(size), 10)
