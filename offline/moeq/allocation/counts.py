"""How many experts of a layer get each width."""

from moeq.errors import MoeqError


def expert_counts(bits: float, levels: tuple[int, ...], num_experts: int) -> dict[int, int]:
    """Split a layer's experts over the widths so that they average ``bits``.

    The paper's rule (arXiv 2604.06515, section 5) for two levels, and for three equally spaced
    ones; with one level all experts get it.

    Args:
        bits: Average width asked for.
        levels: Widths, highest first.
        num_experts: Experts of the layer.

    Returns:
        Width to number of experts. If ``bits * num_experts`` is no integer, their average differs
        from ``bits``; the plan states both.

    Raises:
        MoeqError: The levels cannot reach ``bits`` or are more than the rule covers.
    """
    if list(levels) != sorted(set(levels), reverse=True) or not levels:
        raise MoeqError(f"`levels` {_text(levels)} must name different widths, highest first")
    highest, lowest = levels[0], levels[-1]
    if not lowest <= bits <= highest:
        raise MoeqError(f"`bits` {bits:g} is outside of `levels` {_text(levels)}")
    if len(levels) == 1:
        return {highest: num_experts}
    if len(levels) == 2:
        promoted = round((bits - lowest) / (highest - lowest) * num_experts)
        return {highest: promoted, lowest: num_experts - promoted}
    if len(levels) == 3 and levels[0] - levels[1] == levels[1] - levels[2]:
        return _three_levels(bits, (levels[0], levels[1], levels[2]), num_experts)
    raise MoeqError(
        f"`levels` {_text(levels)}: the paper's rule takes one width, two, or three equally "
        "spaced ones such as 3,2,1"
    )


def _three_levels(bits: float, levels: tuple[int, int, int], num_experts: int) -> dict[int, int]:
    highest, middle, lowest = levels
    high = low = 0
    if bits >= middle:
        high = round((bits - middle) / (highest - middle) * num_experts)
    else:
        low = num_experts - round((bits - lowest) / (middle - lowest) * num_experts)
    mid = num_experts - high - low
    # Trade pairs (middle, middle) for (highest, lowest): the average stays.
    # Rounded, so that an average such as 8/3 lands on the boundary that it means.
    thirds_below = round(3 * (highest - bits) / (highest - lowest), 9)
    trades = 0
    if thirds_below < 1:
        trades = mid // 2
    elif thirds_below <= 2:
        while mid - 2 * (trades + 1) >= trades + 1:
            trades += 1
    return {highest: high + trades, middle: mid - 2 * trades, lowest: low + trades}


def _text(levels: tuple[int, ...]) -> str:
    return ",".join(map(str, levels))
