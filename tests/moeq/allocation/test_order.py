"""The orders of experts, and the MaxVar re-order against a second reading of the method."""

import random
from collections.abc import Callable

import pytest
import torch

from moeq.allocation import combined_order, maxvar_order, router_norm_order
from moeq.errors import MoeqError


def _sorted(change: list[float]) -> list[int]:
    return sorted(range(len(change)), key=lambda expert: (change[expert], expert))


def _stable(change: list[float], variance: list[float], zeta: float) -> list[int]:
    """Write out the prose of the method: sort, then scan from last to first until stable."""
    order = _sorted(change)
    for _ in range(1000):
        before = list(order)
        for expert in before[::-1]:
            for earlier in order[: order.index(expert)]:
                if zeta * variance[earlier] < variance[expert]:
                    order.remove(expert)
                    order.insert(order.index(earlier), expert)
                    break
        if order == before:
            return order
    raise AssertionError("the re-order does not end")


def _one_pass(change: list[float], variance: list[float], zeta: float) -> list[int]:
    """Visit each place once, from the last to the first."""
    order = _sorted(change)
    for place in range(len(order) - 1, -1, -1):
        quiet = [i for i in range(place) if zeta * variance[order[i]] < variance[order[place]]]
        if quiet:
            first = quiet[0]
            order = [*order[:first], order[place], *order[first:place], *order[place + 1 :]]
    return order


def _random_cases(count: int) -> list[tuple[list[float], list[float], float]]:
    source = random.Random(0)
    cases = []
    for _ in range(count):
        experts = source.randint(1, 24)
        # Few different values, so that ties are common; exact in float32.
        change = [source.randint(-4, 4) / 4 for _ in range(experts)]
        variance = [2.0 ** source.randint(-6, 6) for _ in range(experts)]
        cases.append((change, variance, source.choice([1.0, 1.5, 2.0, 3.0, 10.0])))
    return cases


@pytest.mark.parametrize(("variant", "reference"), [("stable", _stable), ("one-pass", _one_pass)])
def test_re_order_is_that_of_the_method(
    variant: str, reference: Callable[[list[float], list[float], float], list[int]]
) -> None:
    for change, variance, zeta in _random_cases(1000):
        order = combined_order(torch.tensor(change), torch.tensor(variance), zeta, variant)
        assert order == reference(change, variance, zeta)


def test_no_expert_could_move_in_a_stable_order() -> None:
    for change, variance, zeta in _random_cases(1000):
        order = combined_order(torch.tensor(change), torch.tensor(variance), zeta)
        assert sorted(order) == list(range(len(change)))
        for place, expert in enumerate(order):
            assert not any(zeta * variance[other] < variance[expert] for other in order[:place])


def test_large_zeta_leaves_the_router_norm_order() -> None:
    for change, variance, _ in _random_cases(100):
        tensor = torch.tensor(change)
        assert combined_order(tensor, torch.tensor(variance), 1e9) == router_norm_order(tensor)


def test_a_noisy_expert_moves_before_the_first_quiet_one() -> None:
    # Expert 3 is more than three times as noisy as 1 and 2, but not as 0.
    order = combined_order(torch.tensor([0.0, 1, 2, 3]), torch.tensor([2.0, 1, 1, 4]), 3.0)
    assert order == [0, 3, 1, 2]


def test_a_factor_of_exactly_zeta_does_not_move() -> None:
    assert combined_order(torch.tensor([0.0, 1]), torch.tensor([1.0, 3]), 3.0) == [0, 1]


@pytest.mark.parametrize("zeta", [0.99, 0.0, -1.0, float("nan")])
def test_zeta_below_one_is_refused(zeta: float) -> None:
    with pytest.raises(MoeqError, match="`zeta`"):
        combined_order(torch.tensor([0.0, 1]), torch.tensor([1.0, 3]), zeta)


def test_unknown_variant_is_refused() -> None:
    with pytest.raises(MoeqError, match="`reorder` twice"):
        combined_order(torch.tensor([0.0, 1]), torch.tensor([1.0, 3]), 3.0, "twice")


def test_small_router_norm_changes_come_first_and_ties_keep_expert_order() -> None:
    assert router_norm_order(torch.tensor([0.5, -1.0, 0.5, -1.0, 0.0])) == [1, 3, 4, 0, 2]


def test_large_variances_come_first_and_ties_keep_expert_order() -> None:
    assert maxvar_order(torch.tensor([0.5, 2.0, 0.5, 2.0, 1.0])) == [1, 3, 4, 0, 2]
