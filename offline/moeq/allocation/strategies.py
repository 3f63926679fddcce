"""Bit plans from a named strategy."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from moeq.allocation.constraints import Constraints
from moeq.allocation.counts import expert_counts
from moeq.allocation.order import (
    DEFAULT_ZETA,
    combined_order,
    maxvar_order,
    router_norm_order,
)
from moeq.checkpoint.families import MoELayer, check_plan_fits
from moeq.checkpoint.reader import CheckpointReader
from moeq.errors import MoeqError
from moeq.signals import load_base_routers, max_var, router_norms
from vllm_moeq._version import __version__
from vllm_moeq.format import WIDTHS, BitPlan, LayerBits, Provenance, packed_bytes

MEASURED = ("auto", "sensitivity")
"""Strategies that need calibration text; see ``moeq.planning.planner``."""
STRATEGIES = (*MEASURED, "combined", "router-norm", "maxvar", "uniform", "random:SEED")

DEFAULT_GROUP_SIZE = 128

_RANK_TOLERANCE = 0.01
"""Expert-parallel ranks of equal bytes may differ from their mean by this share of it."""
_SIDE = {"same_width", "widths_per_layer", "layer_tolerance", "ranks"}
_USED_OPTIONS = {
    "auto": {"levels", "base_router", "zeta", "maxvar", "reorder", *_SIDE},
    "sensitivity": {"levels", *_SIDE},
    "combined": {"levels", "base_router", "zeta", "maxvar", "reorder"},
    "router-norm": {"levels", "base_router"},
    "maxvar": {"levels", "maxvar"},
    "uniform": set(),
    "random": {"levels"},
}
"""Options that a strategy takes, beside --bits and --group-size."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user asks of a plan.

    Attributes:
        bits: Average width of expert weights.
        levels: Widths to use, highest first; None takes the widths next to ``bits``.
        strategy: One of :data:`STRATEGIES`.
        group_size: Weights of a row that share a scale.
        group_sizes: Several that the plan may choose from, with as many bytes as ``group_size``,
            the largest of them, would take; None if there is no choice.
        base_router: Where the router from before training is, or None.
        zeta: Factor of the MaxVar re-order.
        maxvar: Definition of MaxVar.
        reorder: How often the re-order runs.
        same_width: See :class:`moeq.allocation.Constraints`, here and below.
        widths_per_layer: Most different widths in a layer.
        layer_tolerance: Share of the mean by which the bytes of layers may differ.
        ranks: Expert-parallel ranks that are to hold equal bytes.
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
    same_width: bool = False
    widths_per_layer: int | None = None
    layer_tolerance: float | None = None
    ranks: int = 1

    @property
    def constraints(self) -> Constraints:
        """What a plan must fulfil beside its size."""
        return Constraints(
            layer_tolerance=self.layer_tolerance,
            widths_per_layer=self.widths_per_layer,
            ranks=self.ranks,
            rank_tolerance=_RANK_TOLERANCE if self.ranks > 1 else 0.0,
            same_width=self.same_width,
        )

    def check(self) -> None:
        """Refuse options that the strategy would ignore.

        Raises:
            MoeqError: Such an option, or an unknown strategy; names it.
        """
        used = _USED_OPTIONS.get(self.strategy.partition(":")[0])
        if used is None or (":" in self.strategy) != self.strategy.startswith("random"):
            raise MoeqError(f"--strategy {self.strategy} is not one of {', '.join(STRATEGIES)}")
        if self.group_sizes and self.strategy not in MEASURED:
            raise MoeqError(
                f"--group-size {','.join(map(str, self.group_sizes))} is a choice that --strategy "
                f"{self.strategy} cannot make; give one of them, or --strategy sensitivity"
            )
        for field in fields(self):
            optional = field.name not in ("bits", "strategy", "group_size", "group_sizes")
            if optional and field.name not in used and getattr(self, field.name) != field.default:
                option = field.name.replace("_", "-")
                raise MoeqError(f"--{option} has no effect with --strategy {self.strategy}")

    def resolved_levels(self) -> tuple[int, ...]:
        """Return the widths to use, highest first.

        Raises:
            MoeqError: A width that the format lacks, or an average that no width reaches.
        """
        if self.strategy == "uniform":
            if self.bits not in WIDTHS:
                raise MoeqError(
                    f"--strategy uniform needs --bits to be one width "
                    f"({', '.join(map(str, WIDTHS))}), not {self.bits:g}"
                )
            return (int(self.bits),)
        for level in self.levels or ():
            if level not in WIDTHS:
                raise MoeqError(f"--levels: {level} is not one of {', '.join(map(str, WIDTHS))}")
        if self.levels:
            return self.levels
        if not WIDTHS[0] <= self.bits <= WIDTHS[-1]:
            raise MoeqError(f"--bits {self.bits:g} is not between {WIDTHS[0]} and {WIDTHS[-1]}")
        above = min(width for width in WIDTHS if width >= self.bits)
        below = max(width for width in WIDTHS if width <= self.bits)
        return (above,) if above == below else (above, below)


class PlanSizes(NamedTuple):
    """Sizes that a plan leads to.

    Attributes:
        expert_weights: Number of routed expert weights.
        achieved_bits: Average nominal width.
        bits_per_weight: The same with scales and zero points.
        expert_bytes: Bytes of all packed experts.
        total_bytes: The same with all other tensors.
    """

    expert_weights: int
    achieved_bits: float
    bits_per_weight: float
    expert_bytes: int
    total_bytes: int


def plan_sizes(plan: BitPlan, reader: CheckpointReader, layers: list[MoELayer]) -> PlanSizes:
    """Return the sizes that a plan leads to for a model of these layers."""
    weights = code_bits = size = 0
    other = sum(info.num_bytes for info in reader.tensors.values())
    for layer in layers:
        bits = plan.expert_bits[layer.container]
        for expert, matrix, projection in layer.weights():
            rows, columns = layer.shape(matrix)
            width = bits.width(projection, expert)
            weights += rows * columns
            code_bits += rows * columns * width
            size += packed_bytes(rows, columns, width, plan.group_size)
            other -= reader.info(layer.tensor_name(expert, matrix)).num_bytes
    return PlanSizes(weights, code_bits / weights, size * 8 / weights, size, size + other)


def with_sizes(plan: BitPlan, reader: CheckpointReader, layers: list[MoELayer]) -> BitPlan:
    """Return a plan that fits a model with the true sizes in its provenance."""
    sizes = plan_sizes(plan, reader, layers)
    provenance = replace(
        plan.provenance,
        achieved_bits=sizes.achieved_bits,
        bits_per_weight=sizes.bits_per_weight,
        expert_bytes=sizes.expert_bytes,
        total_bytes=sizes.total_bytes,
    )
    return replace(plan, provenance=provenance)


def ordered_bits(order: list[int], bits: float, levels: tuple[int, ...]) -> LayerBits:
    """Give the widths of :func:`expert_counts` to a layer's experts, the highest to the first."""
    counts = expert_counts(bits, levels, len(order))
    ladder = [width for width, count in counts.items() for _ in range(count)]
    width_of = dict(zip(order, ladder, strict=True))
    widths = tuple(width_of[expert] for expert in range(len(order)))
    return LayerBits(widths, widths)


def make_plan(
    reader: CheckpointReader, layers: list[MoELayer], options: PlanOptions, source: str
) -> BitPlan:
    """Decide the width of every expert.

    Reads routers and first projections only, and only if the strategy needs them.

    Raises:
        MoeqError: Options that contradict each other or do not fit the model; names them.
    """
    options.check()
    if options.strategy in MEASURED:
        raise MoeqError(
            f"--strategy {options.strategy} needs calibration text: --calib FILE, or --calib "
            "default"
        )
    levels = options.resolved_levels()
    expert_bits = {}
    details: dict[str, object] = {"levels": list(levels)}
    for layer, order in _orders(reader, layers, options, details):
        expert_bits[layer.container] = ordered_bits(order, options.bits, levels)
    provenance = Provenance(
        strategy=options.strategy,
        requested_bits=options.bits,
        source=source,
        moeq_version=__version__,
        details=details,
    )
    plan = BitPlan(options.group_size, expert_bits, provenance)
    check_plan_fits(plan, layers)
    return with_sizes(plan, reader, layers)


def _orders(
    reader: CheckpointReader,
    layers: list[MoELayer],
    options: PlanOptions,
    details: dict[str, object],
) -> Iterator[tuple[MoELayer, list[int]]]:
    """Yield each layer with its experts in order, most bits first; note how in ``details``."""
    strategy = options.strategy
    if strategy == "uniform":
        yield from ((layer, list(range(layer.num_experts))) for layer in layers)
    elif strategy.startswith("random:"):
        generator = torch.Generator().manual_seed(_seed(strategy))
        for layer in layers:
            yield layer, torch.randperm(layer.num_experts, generator=generator).tolist()
    elif strategy == "maxvar":
        details["maxvar"] = options.maxvar
        for layer in layers:
            yield layer, maxvar_order(max_var(reader, layer, options.maxvar))
    else:
        base: Mapping[str, torch.Tensor] | None = None
        if options.base_router is not None:
            base = load_base_routers(options.base_router, layers)
        details["router_signal"] = "final norm (surrogate)" if base is None else "norm change"
        if strategy == "combined":
            details |= {"maxvar": options.maxvar, "zeta": options.zeta, "reorder": options.reorder}
        for layer in layers:
            change = router_norms(reader, layer, base).values
            if strategy == "router-norm":
                yield layer, router_norm_order(change)
            else:
                variance = max_var(reader, layer, options.maxvar)
                yield layer, combined_order(change, variance, options.zeta, options.reorder)


def _seed(strategy: str) -> int:
    text = strategy.removeprefix("random:")
    if not text.isdecimal() or int(text) >= 2**63:
        raise MoeqError(f"--strategy {strategy}: SEED must be a whole number, as in random:0")
    return int(text)
