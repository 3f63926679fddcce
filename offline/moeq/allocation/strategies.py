"""Bit plans from a named strategy that needs no text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from moeq.allocation.budget import bits_by_layer
from moeq.allocation.constraints import NO_CONSTRAINTS, Constraints
from moeq.allocation.counts import expert_counts
from moeq.allocation.order import combined_order, maxvar_order, router_norm_order
from moeq.checkpoint import MoELayer, SourceModel
from moeq.checkpoint.fits import check_plan_fits
from moeq.checkpoint.linear import FULL_WIDTH, uniform_linear_bits
from moeq.checkpoint.sizes import with_sizes
from moeq.errors import MoeqError
from moeq.requests import DEFAULT_ZETA
from moeq.signals import load_base_routers, max_var, router_norms
from vllm_moeq._version import __version__
from vllm_moeq.format import WIDTHS, BitPlan, LayerBits, Provenance

DEFAULT_GROUP_SIZE = 128


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a plan is made by.

    Attributes:
        bits: Average width of expert weights.
        levels: Widths to use, highest first; None takes the widths next to ``bits``.
        strategy: One of :data:`moeq.requests.STRATEGIES`.
        group_size: Weights of a row that share a scale.
        group_sizes: Several that the plan may choose from, with as many bytes as ``group_size``,
            the largest of them, would take; None if there is no choice.
        base_router: Where the router from before training is, or None.
        zeta: Factor of the MaxVar re-order.
        maxvar: Definition of MaxVar.
        reorder: How often the re-order runs.
        constraints: What a measured plan must fulfil beside its size.
        budget: Bytes of all packed experts, to be used up to the last whole expert: layers may
            differ by one. None gives every layer the average next to ``bits``.
        linear: Width of dense layers, 16 to leave them as they are.
        chooses_linear: Whether a measured plan chooses the width of each dense layer instead, in
            as many bytes as experts and dense layers take together.
    """

    bits: float
    levels: tuple[int, ...] | None = None
    strategy: str = "combined"
    group_size: int = DEFAULT_GROUP_SIZE
    group_sizes: tuple[int, ...] | None = None
    base_router: str | None = None
    zeta: float = DEFAULT_ZETA
    maxvar: str = "max-row"
    reorder: str = "stable"
    constraints: Constraints = NO_CONSTRAINTS
    budget: int | None = None
    linear: int = FULL_WIDTH
    chooses_linear: bool = False

    def resolved_levels(self) -> tuple[int, ...]:
        """Return the widths to use, highest first.

        Raises:
            MoeqError: An average that no width reaches.
        """
        if self.strategy == "uniform":
            if self.bits not in WIDTHS:
                raise MoeqError(
                    f"`strategy` uniform needs `bits` to be one width "
                    f"({', '.join(map(str, WIDTHS))}), not {self.bits:g}"
                )
            return (int(self.bits),)
        if self.levels:
            return self.levels
        if not WIDTHS[0] <= self.bits <= WIDTHS[-1]:
            raise MoeqError(f"`bits` {self.bits:g} is not between {WIDTHS[0]} and {WIDTHS[-1]}")
        above = min(width for width in WIDTHS if width >= self.bits)
        below = max(width for width in WIDTHS if width <= self.bits)
        return (above,) if above == below else (above, below)

    def layer_bits(self, layers: list[MoELayer]) -> list[float]:
        """Return the average width of each layer."""
        if self.budget is None or self.strategy == "uniform":
            return [self.bits] * len(layers)
        return bits_by_layer(self.budget, layers, self.group_size, self.resolved_levels())


def ordered_bits(order: list[int], bits: float, levels: tuple[int, ...]) -> LayerBits:
    """Give the widths of :func:`expert_counts` to a layer's experts, the highest to the first."""
    counts = expert_counts(bits, levels, len(order))
    ladder = [width for width, count in counts.items() for _ in range(count)]
    width_of = dict(zip(order, ladder, strict=True))
    widths = tuple(width_of[expert] for expert in range(len(order)))
    return LayerBits(widths, widths)


def make_plan(source: SourceModel, options: PlanOptions) -> BitPlan:
    """Decide the width of every expert by a strategy that needs no text.

    Reads routers and first projections only, and only if the strategy needs them.

    Raises:
        MoeqError: Options that contradict each other or do not fit the model; names them.
    """
    levels = options.resolved_levels()
    expert_bits = {}
    details: dict[str, object] = {"levels": list(levels)}
    averages = options.layer_bits(source.layers)
    for bits, (layer, order) in zip(averages, _orders(source, options, details), strict=True):
        expert_bits[layer.container] = ordered_bits(order, bits, levels)
    provenance = Provenance(
        strategy=options.strategy,
        requested_bits=options.bits,
        source=source.public_name,
        moeq_version=__version__,
        details=details,
    )
    linear = uniform_linear_bits(source.linear, options.linear, options.group_size)
    plan = BitPlan(options.group_size, expert_bits, provenance, linear)
    check_plan_fits(plan, source.layers)
    return with_sizes(plan, source)


def _orders(
    source: SourceModel, options: PlanOptions, details: dict[str, object]
) -> Iterator[tuple[MoELayer, list[int]]]:
    """Yield each layer with its experts in order, most bits first; note how in ``details``."""
    strategy, layers = options.strategy, source.layers
    if strategy == "uniform":
        yield from ((layer, list(range(layer.num_experts))) for layer in layers)
    elif strategy.startswith("random:"):
        generator = torch.Generator().manual_seed(int(strategy.removeprefix("random:")))
        for layer in layers:
            yield layer, torch.randperm(layer.num_experts, generator=generator).tolist()
    elif strategy == "maxvar":
        details["maxvar"] = options.maxvar
        for layer in layers:
            yield layer, maxvar_order(max_var(source, layer, options.maxvar))
    else:
        base: Mapping[str, torch.Tensor] | None = None
        if options.base_router is not None:
            base = load_base_routers(options.base_router, layers)
        details["router_signal"] = "final norm (surrogate)" if base is None else "norm change"
        if strategy == "combined":
            details |= {"maxvar": options.maxvar, "zeta": options.zeta, "reorder": options.reorder}
        for layer in layers:
            change = router_norms(source, layer, base).values
            if strategy == "router-norm":
                yield layer, router_norm_order(change)
            else:
                variance = max_var(source, layer, options.maxvar)
                yield layer, combined_order(change, variance, options.zeta, options.reorder)
