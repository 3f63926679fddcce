"""How many bytes the packed experts may take: what the options for the size of a model ask for."""

import math
from collections.abc import Iterable
from fractions import Fraction

from moeq.checkpoint import MoELayer, SourceModel
from moeq.checkpoint.linear import FULL_WIDTH, LinearGroup, linear_groups
from moeq.checkpoint.sizes import option_sizes
from moeq.errors import MoeqError
from vllm_moeq.format import LINEAR_WIDTHS, WIDTHS

_LARGEST_DENOMINATOR = 10**6


def bits_budget(
    bits: float, layers: list[MoELayer], group_size: int, widths: tuple[int, ...] = WIDTHS
) -> int:
    """Return the bytes of packed experts that average ``bits``, as a plan's ``bits`` mean it.

    Scales and zero points come on top: a uniform plan, and any mix with the same average over all
    weights, takes just these bytes.

    Args:
        bits: Nominal average width of expert weights. Taken as the fraction with a denominator
            up to a million next to it, so that 2.6 and 8/3 are what they seem.
        layers: MoE layers of the model.
        group_size: Weights of a row that share a scale.
        widths: Widths that a plan may use.

    Raises:
        MoeqError: No mix of the widths has this average.
    """
    if not min(widths) <= bits <= max(widths):
        raise MoeqError(f"`bits` {bits:g} is not between {min(widths)} and {max(widths)}")
    low, high = (_uniform_bytes(layers, group_size, width) for width in (WIDTHS[0], WIDTHS[-1]))
    exact = Fraction(bits).limit_denominator(_LARGEST_DENOMINATOR)
    return math.floor(low + (high - low) * (exact - WIDTHS[0]) / (WIDTHS[-1] - WIDTHS[0]))


def average_bits(budget: int, layers: list[MoELayer], group_size: int) -> float:
    """Return the average width that fills a budget of bytes, the inverse of :func:`bits_budget`.

    At most the largest width.
    """
    low, high = (_uniform_bytes(layers, group_size, width) for width in (WIDTHS[0], WIDTHS[-1]))
    exact = WIDTHS[0] + Fraction(budget - low, high - low) * (WIDTHS[-1] - WIDTHS[0])
    return float(min(exact, Fraction(WIDTHS[-1])))


def bits_by_layer(
    budget: int, layers: list[MoELayer], group_size: int, levels: tuple[int, ...]
) -> list[float]:
    """Return the average width of each layer with which whole experts use up a budget of bytes.

    Layers differ by one expert's step between two levels at most, and so does what they take
    together from the budget, which is never exceeded.

    Args:
        budget: Bytes of all packed experts.
        layers: MoE layers of the model.
        group_size: Weights of a row that share a scale.
        levels: Widths to use, highest first, equally spaced.
    """
    lowest, spacing = levels[-1], levels[0] - levels[1] if len(levels) > 1 else 0
    least = [_uniform_bytes([layer], group_size, lowest) for layer in layers]
    most = [_uniform_bytes([layer], group_size, levels[0]) for layer in layers]
    if budget >= sum(most):
        return [float(levels[0])] * len(layers)
    if budget < sum(least):
        return [average_bits(budget, layers, group_size)] * len(layers)
    share = Fraction(budget - sum(least), sum(most) - sum(least))
    result, left = [], Fraction(0)
    for layer, low, high in zip(layers, least, most, strict=True):
        left += share * (high - low)
        of_an_expert = Fraction(high - low, layer.num_experts * (len(levels) - 1))
        steps = min(left // of_an_expert, layer.num_experts * (len(levels) - 1))
        left -= steps * of_an_expert
        result.append(float(lowest + Fraction(spacing * steps, layer.num_experts)))
    return result


def file_bytes(bits: float, source: SourceModel) -> int:
    """Return the bytes of a whole checkpoint that ``bits_per_weight`` allows.

    Args:
        bits: Average bits of all weights, with scales and zero points.
        source: The model.

    Raises:
        MoeqError: No such number of bits.
    """
    if not 0 < bits < math.inf:
        raise MoeqError(f"`bits_per_weight` {bits:g} must be above 0 and finite")
    return math.floor(Fraction(bits).limit_denominator(_LARGEST_DENOMINATOR) * source.weights / 8)


def fits_file(
    target: int,
    source: SourceModel,
    group_size: int,
    *,
    linear: int = FULL_WIDTH,
    widths: tuple[int, ...] = WIDTHS,
) -> bool:
    """Say whether any plan is as small as a file; arguments are those of :func:`file_budget`."""
    other = _other_bytes(source, source.linear, group_size, linear)
    return target >= other + _uniform_bytes(source.layers, group_size, min(widths))


def file_budget(
    target: int,
    source: SourceModel,
    group_size: int,
    *,
    linear: int = FULL_WIDTH,
    widths: tuple[int, ...] = WIDTHS,
    asked: str = "`target_size`",
) -> int:
    """Return the bytes that the size of a checkpoint leaves to the packed experts.

    Args:
        target: Bytes of all tensors of the packed checkpoint.
        source: The model; what is no routed expert and no dense layer keeps its size.
        group_size: Weights of a row that share a scale.
        linear: Width of dense layers, but of those that the source stores with a smaller one.
        widths: Widths that a plan may use.
        asked: What asks for it, for the message.

    Raises:
        MoeqError: No plan is as small; names the least possible, and options that make it smaller.
    """
    other = _other_bytes(source, source.linear, group_size, linear)
    if not fits_file(target, source, group_size, linear=linear, widths=widths):
        least = _uniform_bytes(source.layers, group_size, min(widths))
        raise MoeqError(
            f"{asked} allows {target:,} bytes: the model takes at least {other + least:,} bytes "
            f"({(other + least) * 8 / source.weights:.4g} bits per weight), {other:,} for all but "
            f"the experts and {least:,} for experts of {min(widths)} bits with their scales"
            f"{_remedy(target, source, group_size, other, least)}"
        )
    return target - other


def _other_bytes(
    source: SourceModel, groups: Iterable[LinearGroup], group_size: int, linear: int
) -> int:
    """Return the bytes of all but the experts, with dense layers of one width."""
    return source.other_bytes + sum(
        group.num_bytes(group.width(linear, group_size), group_size) - group.full_bytes
        for group in groups
        if group.fits(group_size)
    )


def _remedy(target: int, source: SourceModel, group_size: int, other: int, least: int) -> str:
    """Name options with which all but the experts is smaller: those that reach the target, if any.

    Args:
        target: Bytes of the whole checkpoint.
        source: The model.
        group_size: Weights of a row that share a scale.
        other: Bytes of all but the experts as they are.
        least: Bytes of the experts.
    """
    width = min(LINEAR_WIDTHS)
    every = linear_groups(source.reader, source.layers, embeddings=True)
    remedies = {
        f"`dense_bits` {width}": source.linear,
        f"`dense_bits` {width} and `quantize_embeddings`": every,
    }
    sizes = {
        options: _other_bytes(source, groups, group_size, width)
        for options, groups in remedies.items()
    }
    smaller = {options: size + least for options, size in sizes.items() if size < other}
    if not smaller:
        return ""
    smallest = min(smaller, key=smaller.__getitem__)
    options = next((options for options, size in smaller.items() if size <= target), smallest)
    return f". With {options} it takes {smaller[options]:,}"


def _uniform_bytes(layers: list[MoELayer], group_size: int, width: int) -> int:
    return int(option_sizes(layers, group_size, (width,)).sum())
