"""What bit plans cost a trained model of the setting: embedding, rounding, accuracy."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from setting import (
    Setting,
    draw_test,
    forward,
    initial_weights,
    mean_where,
    norm_change,
    route,
    train,
)

from moeq.allocation import combined_order, maxvar_order, router_norm_order
from moeq.requests import DEFAULT_ZETA
from moeq.rounding import quantize_rtn

GROUP_SIZE = 32
DIMENSIONS = 2
"""Dimensions of a token for each pattern: half of them carry none."""

Rounding = Callable[[torch.Tensor, int], torch.Tensor]


def product(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Round as `moeq quantize` does: a grid for each group of a row, searched for least error.

    Args:
        weights: [..., dimensions].
        bits: Width.
    """
    rows = weights.flatten(0, -2)
    return quantize_rtn(rows, bits, GROUP_SIZE).dequantize(bits, GROUP_SIZE).view_as(weights)


def symmetric(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Round on a grid without zero point from minus to plus the largest weight of a group."""
    groups = weights.unflatten(-1, (-1, GROUP_SIZE))
    half = (2**bits - 1) / 2
    scale = groups.abs().amax(-1, keepdim=True) / half
    codes = (groups / scale - 0.5).round().clamp(-half - 0.5, half - 0.5)
    return ((codes + 0.5) * scale).view_as(weights)


def shared(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Round on one grid for all experts of a run, from the smallest to the largest weight."""
    low = weights.amin((1, 2, 3), keepdim=True)
    scale = (weights.amax((1, 2, 3), keepdim=True) - low) / (2**bits - 1)
    return low + ((weights - low) / scale).round() * scale


ROUNDINGS: dict[str, Rounding] = {
    "`quantize_rtn`": product,
    "symmetric, no zero point": symmetric,
    "one grid for all experts": shared,
}


class Embedding:
    """Where the patterns lie among all dimensions of a token, and what other weights lie there.

    The patterns are rows of a random orthogonal matrix, one matrix for each run. The other rows
    are directions that no token of the task has: weights there, the background, change no output,
    yet a row's grid must span them. It stands for everything else that a model has learned.
    """

    def __init__(self, runs: int, setting: Setting, generator: torch.Generator) -> None:
        size = DIMENSIONS * setting.patterns
        rows = torch.linalg.qr(torch.randn(runs, size, size, generator=generator))[0]
        self.patterns = rows[:, None, : setting.patterns]
        unused = rows[:, None, setting.patterns :]
        shape = (runs, setting.experts, setting.neurons, size - setting.patterns)
        self.unit_background = torch.randn(shape, generator=generator) @ unused

    def embed(self, experts: torch.Tensor, background_std: float) -> torch.Tensor:
        """Return weights [runs, experts, neurons, dimensions] from products with the patterns."""
        return experts @ self.patterns + background_std * self.unit_background

    def products(self, weights: torch.Tensor) -> torch.Tensor:
        """Return products with the patterns of weights [runs, experts, neurons, dimensions]."""
        return weights @ self.patterns.transpose(-1, -2)


@dataclass(frozen=True, slots=True)
class Costs:
    """What plans cost in each run.

    Attributes:
        rare: Accuracy on rare sequences by plan [runs].
        frequent: Accuracy on frequent sequences by plan [runs].
        variance_ratio: Mean MaxVar of frequent experts over that of rare ones [runs].
        margin_change: By kind of experts ("rare", "frequent"): mean and standard deviation, over
            all rare sequences, of what the margin changes by when only these experts are rounded
            to the lower width.
    """

    rare: dict[str, torch.Tensor]
    frequent: dict[str, torch.Tensor]
    variance_ratio: torch.Tensor
    margin_change: dict[str, tuple[float, float]]


def orders(
    change: torch.Tensor, variance: torch.Tensor, setting: Setting, generator: torch.Generator
) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield by plan the order of the experts in each run, most bits first.

    "random, balanced" gives both classes the same bits, as the orders by Lambda mostly do: coarse
    grids make ReLU experts answer a little to everything, which cancels between balanced classes.

    Args:
        change: Lambda [runs, experts].
        variance: MaxVar [runs, experts].
        setting: Says which experts speak for which class.
        generator: Source of the random plans.
    """
    yield "small Λ", [router_norm_order(values) for values in change]
    yield "large Λ", [router_norm_order(-values) for values in change]
    yield "maxvar", [maxvar_order(values) for values in variance]
    both = zip(change, variance, strict=True)
    yield "combined", [combined_order(*values, DEFAULT_ZETA, "stable") for values in both]
    yield "random, balanced", [_balanced(setting, generator) for _ in change]
    yield "random", [torch.randperm(setting.experts, generator=generator).tolist() for _ in change]


def _balanced(setting: Setting, generator: torch.Generator) -> list[int]:
    """Return a random order that takes turns between the classes."""
    shuffled = torch.randperm(setting.experts, generator=generator)
    sign = setting.output_sign[shuffled]
    return torch.stack([shuffled[sign > 0], shuffled[sign < 0]], 1).flatten().tolist()


class Trained:
    """Independent models trained alike, with sequences to test them on."""

    def __init__(self, setting: Setting, rare_rate: float, stop: int, runs: int, seed: int) -> None:
        self.setting = setting
        self._generator = torch.Generator().manual_seed(seed)
        start = initial_weights(runs, setting, self._generator)
        self._embedding = Embedding(runs, setting, self._generator)
        self.test = draw_test(runs, setting, self._generator)
        rate = torch.full((runs,), rare_rate)
        (self.weights,) = train(start, rate, setting, [stop], self._generator)
        self.change = norm_change(start, self.weights)

    def costs(self, background: float, levels: tuple[int, int], rounding: Rounding) -> Costs:
        """Give half of the experts the higher of two widths, by each plan, and measure accuracy.

        Args:
            background: Standard deviation of the weights on directions that carry no pattern.
            levels: The two widths, higher first. "uniform" is measured if their mean is a width.
            rounding: How matrices are rounded.
        """
        full = self._embedding.embed(self.weights.experts, background)
        variance = full.var(-1, correction=0).amax(-1)
        rounded = [self._embedding.products(rounding(full, bits)) for bits in levels]
        routing = route(self.weights.router, self.test.tokens, self.setting.capacity)
        exact = self.weights.experts
        rare, frequent = {}, {}

        def margin(experts: torch.Tensor) -> torch.Tensor:
            return self.test.labels * forward(routing, experts, self.setting)

        def measure(plan: str, experts: torch.Tensor) -> None:
            right = margin(experts).sign() / 2 + 0.5
            rare[plan] = mean_where(self.test.rare, right)
            frequent[plan] = mean_where(~self.test.rare, right)

        measure("16 bits", exact)
        average, odd = divmod(sum(levels), 2)
        if not odd:
            measure("uniform", self._embedding.products(rounding(full, average)))
        for plan, order in orders(self.change, variance, self.setting, self._generator):
            first = torch.tensor(order)[:, : self.setting.experts // 2]
            high = torch.zeros_like(self.change, dtype=torch.bool).scatter_(1, first, True)
            measure(plan, torch.where(high[..., None, None], rounded[0], rounded[1]))

        margin_change = {}
        kinds = {"rare": self.setting.is_rare, "frequent": self.setting.is_frequent}
        for name, kind in kinds.items():
            coarse = torch.where(kind[:, None, None], rounded[1], exact)
            change = (margin(coarse) - margin(exact))[self.test.rare]
            margin_change[name] = (change.mean().item(), change.std().item())
        mean_variance = {name: variance[:, kind].mean(1) for name, kind in kinds.items()}
        ratio = mean_variance["frequent"] / mean_variance["rare"]
        return Costs(rare, frequent, ratio, margin_change)
