"""How many experts get each width: the method's test vectors and what must hold for any input."""

import itertools
from fractions import Fraction

import pytest

from moeq.allocation import expert_counts
from moeq.errors import MoeqError


@pytest.mark.parametrize(
    ("bits", "low_middle_high"),
    [
        (1.5, (4, 4, 0)),
        (2.0, (2, 4, 2)),
        (2.125, (2, 3, 3)),
        (2.25, (2, 2, 4)),
        (2.5, (2, 0, 6)),
        (2.75, (1, 0, 7)),
    ],
)
def test_three_levels_reproduce_the_paper(
    bits: float, low_middle_high: tuple[int, int, int]
) -> None:
    low, middle, high = low_middle_high
    assert expert_counts(bits, (3, 2, 1), 8) == {3: high, 2: middle, 1: low}


def _paper_rule(bits: Fraction, levels: tuple[int, int, int], experts: int) -> dict[int, int]:
    """Restate the three-level rule, for averages that need no rounding."""
    highest, middle, lowest = levels
    third = Fraction(highest - lowest, 3)
    upper = bits >= middle
    top, bottom = (highest, middle) if upper else (middle, lowest)
    promoted = (bits - bottom) / (top - bottom) * experts
    counts = {highest: 0, middle: 0, lowest: 0}
    counts[top] += int(promoted)
    counts[bottom] += experts - int(promoted)
    traded = 0
    while counts[middle] >= 2:
        after = counts[middle] - 2
        if bits < highest - 2 * third or (bits <= highest - third and after < traded + 1):
            break
        counts = {highest: counts[highest] + 1, middle: after, lowest: counts[lowest] + 1}
        traded += 1
    return counts


@pytest.mark.parametrize("levels", [(3, 2, 1), (4, 3, 2)])
@pytest.mark.parametrize("experts", [4, 8, 60, 64, 128])
def test_three_levels_follow_the_rule_at_every_reachable_average(
    levels: tuple[int, int, int], experts: int
) -> None:
    for total in range(levels[2] * experts, levels[0] * experts + 1):
        bits = Fraction(total, experts)
        assert expert_counts(float(bits), levels, experts) == _paper_rule(bits, levels, experts)


@pytest.mark.parametrize("levels", [*itertools.combinations((8, 4, 3, 2, 1), 2), (3, 2, 1)])
@pytest.mark.parametrize("experts", [1, 7, 8, 60])
def test_counts_cover_all_experts_as_near_to_the_average_as_two_levels_can(
    levels: tuple[int, ...], experts: int
) -> None:
    widest_gap = max(a - b for a, b in itertools.pairwise(levels))
    for step in range(101):
        bits = levels[-1] + (levels[0] - levels[-1]) * step / 100
        counts = expert_counts(bits, levels, experts)
        assert list(counts) == list(levels)
        assert min(counts.values()) >= 0
        assert sum(counts.values()) == experts
        total = sum(width * count for width, count in counts.items())
        assert abs(total - bits * experts) <= widest_gap / 2 + 1e-9


def test_one_level_gives_all_experts_that_width() -> None:
    assert expert_counts(4, (4,), 6) == {4: 6}


@pytest.mark.parametrize(
    ("bits", "levels", "message"),
    [
        (2.0, (), "`levels`"),
        (2.5, (2, 3), "highest first"),
        (2.0, (2, 2), "different widths"),
        (3.5, (3, 2), "`bits` 3.5 is outside of `levels` 3,2"),
        (1.5, (3, 2), "`bits` 1.5 is outside of `levels` 3,2"),
        (float("nan"), (3, 2), "`bits` nan"),
        (2.5, (2,), "`bits` 2.5 is outside of `levels` 2"),
        (2.5, (4, 2, 1), "equally spaced"),
        (2.5, (4, 3, 2, 1), "equally spaced"),
    ],
)
def test_levels_that_the_rule_does_not_cover_are_refused(
    bits: float, levels: tuple[int, ...], message: str
) -> None:
    with pytest.raises(MoeqError, match=message):
        expert_counts(bits, levels, 8)
