"""How many bytes the packed experts may take: what the options for the size of a model ask for."""

import math
import re
from fractions import Fraction

import numpy as np

from moeq.allocation.knapsack import Size
from moeq.checkpoint.families import MoELayer
from moeq.checkpoint.reader import CheckpointReader
from moeq.errors import MoeqError
from vllm_moeq.format import PROJECTIONS, WIDTHS, packed_bytes

_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_LARGEST_DENOMINATOR = 10**6


def option_sizes(layers: list[MoELayer], group_size: int, widths: tuple[int, ...]) -> Size:
    """Return the packed bytes of every projection at every width, with scales and zero points.

    Args:
        layers: MoE layers of a model.
        group_size: Weights of a row that share a scale.
        widths: Bits per weight.

    Returns:
        int64 [items, widths]; items are ordered by layer, expert and projection (w13, w2).

    Raises:
        FormatError: The group size does not divide a row, or an unknown width.
    """
    blocks = []
    for layer in layers:
        size = np.zeros((len(PROJECTIONS), len(widths)), np.int64)
        # All experts of a layer have the same shapes.
        for matrix, projection in {(matrix, kind) for _, matrix, kind in layer.weights()}:
            size[PROJECTIONS.index(projection)] += [
                packed_bytes(*layer.shape(matrix), width, group_size) for width in widths
            ]
        blocks.append(np.tile(size, (layer.num_experts, 1)))
    return np.concatenate(blocks)


def bits_budget(
    bits: float, layers: list[MoELayer], group_size: int, widths: tuple[int, ...] = WIDTHS
) -> int:
    """Return the bytes of packed experts that average ``bits``, as ``--bits`` means it.

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
        raise MoeqError(f"--bits {bits:g} is not between {min(widths)} and {max(widths)}")
    low, high = (_uniform_bytes(layers, group_size, width) for width in (WIDTHS[0], WIDTHS[-1]))
    exact = Fraction(bits).limit_denominator(_LARGEST_DENOMINATOR)
    return math.floor(low + (high - low) * (exact - WIDTHS[0]) / (WIDTHS[-1] - WIDTHS[0]))


def bits_per_weight_budget(
    bits: float, layers: list[MoELayer], group_size: int, widths: tuple[int, ...] = WIDTHS
) -> int:
    """Return the bytes of packed experts that ``--bits-per-weight`` allows.

    Args:
        bits: Average bits of an expert weight, with scales and zero points.
        layers: MoE layers of the model.
        group_size: Weights of a row that share a scale.
        widths: Widths that a plan may use.

    Raises:
        MoeqError: The smallest width takes more; names the least possible.
    """
    if not 0 < bits < math.inf:
        raise MoeqError(f"--bits-per-weight {bits:g} must be above 0 and finite")
    weights = sum(
        math.prod(layer.shape(matrix)) for layer in layers for _, matrix, _ in layer.weights()
    )
    budget = math.floor(Fraction(bits).limit_denominator(_LARGEST_DENOMINATOR) * weights / 8)
    least = _uniform_bytes(layers, group_size, min(widths))
    if budget < least:
        raise MoeqError(
            f"--bits-per-weight {bits:g} allows {budget:,} bytes of experts; they take at least "
            f"{least:,} bytes ({min(widths)} bits and scales for each group of {group_size}: "
            f"{least * 8 / weights:g} bits per weight)"
        )
    return budget


def average_bits(budget: int, layers: list[MoELayer], group_size: int) -> float:
    """Return the average width that fills a budget of bytes, the inverse of :func:`bits_budget`.

    Rounded down to whole experts of the layer that has fewest, and at most the largest width.
    """
    low, high = (_uniform_bytes(layers, group_size, width) for width in (WIDTHS[0], WIDTHS[-1]))
    exact = WIDTHS[0] + Fraction(budget - low, high - low) * (WIDTHS[-1] - WIDTHS[0])
    experts = min(layer.num_experts for layer in layers)
    return float(min(Fraction(math.floor(exact * experts), experts), Fraction(WIDTHS[-1])))


def target_size_budget(
    target: str,
    reader: CheckpointReader,
    layers: list[MoELayer],
    group_size: int,
    widths: tuple[int, ...] = WIDTHS,
) -> int:
    """Return the bytes that ``--target-size`` leaves to the packed experts.

    Args:
        target: Size of all tensors of the packed checkpoint, for :func:`parse_size`.
        reader: The source checkpoint; what is not a routed expert keeps its size.
        layers: Its MoE layers.
        group_size: Weights of a row that share a scale.
        widths: Widths that a plan may use.

    Raises:
        MoeqError: No plan is as small, or no size; names the least possible.
    """
    experts = {
        layer.tensor_name(expert, matrix)
        for layer in layers
        for expert, matrix, _ in layer.weights()
    }
    other = sum(info.num_bytes for name, info in reader.tensors.items() if name not in experts)
    budget = parse_size(target) - other
    least = _uniform_bytes(layers, group_size, min(widths))
    if budget < least:
        raise MoeqError(
            f"--target-size {target} is too small: the model takes at least {other + least:,} "
            f"bytes, {other:,} for what is not quantized and {least:,} for experts of "
            f"{min(widths)} bits with their scales"
        )
    return budget


def parse_size(text: str) -> int:
    """Return the bytes that a size such as 14GB (1e9 bytes) or 13.5GiB (2**30 bytes) means.

    Raises:
        MoeqError: No size, or one without a unit.
    """
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]+)", text.lower())
    if not match or match[2] not in units:
        raise MoeqError(
            f"--target-size {text} is no size with a unit ({', '.join(_UNITS)}), such as 14GB or "
            "13.5GiB"
        )
    return math.floor(Fraction(match[1]) * units[match[2]])


def _uniform_bytes(layers: list[MoELayer], group_size: int, width: int) -> int:
    return int(option_sizes(layers, group_size, (width,)).sum())
