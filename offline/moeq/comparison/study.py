"""Tries every strategy at every budget; each expert is rounded once for each width."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from moeq.allocation import (
    PlanOptions,
    allocate,
    make_plan,
    ordered_bits,
    plan_sizes,
)
from moeq.checkpoint.families import MoELayer, check_group_size
from moeq.checkpoint.reader import CheckpointReader
from moeq.checkpoint.workspace import check_space
from moeq.errors import MoeqError
from moeq.evaluation import Evaluation
from moeq.model.layerwise import LayerwiseModel
from moeq.planning.cost import measuring_bytes
from moeq.planning.planner import judge
from moeq.sensitivity.bank import Bank, build
from moeq.sensitivity.fisher import gradients
from moeq.signals import load_base_routers
from moeq.signals.table import SIGNALS, Evidence
from vllm_moeq.format import WIDTHS, BitPlan, LayerBits, Provenance

ALLOCATED = {"sensitivity": "loss", "output-error": "output", "weight-error": "weight"}
"""Signals that are losses, too: widths that make their sum least, over all layers together."""
GLOBAL = "global "
"""Stands before their names."""
_REVERSED = " reversed"
STRATEGIES = (
    *(GLOBAL + name for name in ALLOCATED),
    "combined",
    *(signal.name for signal in SIGNALS),
    "router-norm" + _REVERSED,
)
"""All that can be compared, beside uniform and random plans, which always are."""


Signals = dict[str, dict[str, list[float]]]
"""A number for each expert, by name of the signal and container of the layer."""


@dataclass(frozen=True, slots=True)
class Point:
    """One plan and what it costs.

    Attributes:
        method: How experts are rounded.
        bits: Average width asked for.
        strategy: How widths were chosen; ``random:SEED`` for random plans.
        plan: The widths.
        total_bytes: Of all tensors of the packed checkpoint.
        evaluation: On held-out text.
    """

    method: str
    bits: float
    strategy: str
    plan: BitPlan
    total_bytes: int
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that a comparison finds.

    Attributes:
        points: All plans.
        signals: Those that need calibration are of the last method, damage is at the width next
            below the least average.
        correlations: Of each signal with the measured sensitivity: Spearman's, the mean over
            layers; positive where experts that it gives more bits are more sensitive.
    """

    points: list[Point]
    signals: Signals
    correlations: dict[str, float]


@dataclass(frozen=True, slots=True)
class Study:
    """A comparison to be run.

    Attributes:
        reader: The checkpoint.
        layers: Its MoE layers.
        source: The model as the user named it.
        base_router: Where the router from before training is, or None.
        bits: Average widths to compare plans at.
        methods: ``gptq`` and those of :data:`moeq.rounding.DATA_FREE`.
        group_size: Weights that share a scale.
        random_plans: Of each budget.
        tokens: int64 [n, L]: calibration text.
        heldout: Text to its tokens, int64 [n, L].
        device: Where layers run and experts are rounded.
        seed: Of the tokens drawn for the Fisher information.
        strategies: Those of :data:`STRATEGIES` to compare.
    """

    reader: CheckpointReader
    layers: list[MoELayer]
    source: str
    base_router: str | None
    bits: tuple[float, ...]
    methods: tuple[str, ...]
    group_size: int
    random_plans: int
    tokens: torch.Tensor
    heldout: dict[str, torch.Tensor]
    device: torch.device
    seed: int = 0
    strategies: tuple[str, ...] = STRATEGIES

    def run(self, progress: bool = True) -> Findings:
        """Round, plan and judge.

        Raises:
            MoeqError: Something does not fit the model, or is not finite; names it.
        """
        check_group_size(self.group_size, self.layers)
        widths = self._widths()
        needed = measuring_bytes(self.layers, widths, (self.group_size,), self.tokens.numel())
        model = LayerwiseModel(self.reader, self.layers, self.device)
        base = None
        if self.base_router is not None:
            base = load_base_routers(self.base_router, self.layers)
        points: list[Point] = []
        signals: Signals = {}
        at_width: dict[int, Signals] = {}
        with TemporaryDirectory(prefix="moeq-") as name:
            check_space(needed, Path(name))
            felt = gradients(model, self.tokens, Path(name), self.seed, progress)
            for method in self.methods:
                folder = Path(name) / method
                folder.mkdir()
                bank = build(
                    model, self.tokens, widths, self.group_size, method, felt, folder,
                    progress,
                )  # fmt: skip
                for width in sorted({_floor(bits) for bits in self.bits}, reverse=True):
                    evidence = Evidence(model, base, bank, width)
                    signals = self._signals(evidence, signals, at_width.get(width, {}))
                    at_width[width] = signals
                plans = [
                    plan
                    for bits in self.bits
                    for plan in self._plans(bits, bank, at_width[_floor(bits)])
                    if self._is_wanted(plan)
                ]
                sources = [bank.source(plan, self.device) for plan in plans]
                for plan, found in zip(
                    plans, judge(model, sources, self.heldout, progress), strict=True
                ):
                    points.append(self._point(method, plan, found))
                shutil.rmtree(folder)
        return Findings(points, signals, correlations(signals))

    def _widths(self) -> tuple[int, ...]:
        """Return the widths from one below the least average to one above the largest."""
        low, high = min(self.bits), max(self.bits)
        if not WIDTHS[0] <= low <= high <= WIDTHS[-1]:
            raise MoeqError(f"--bits must be between {WIDTHS[0]} and {WIDTHS[-1]}")
        first = WIDTHS.index(_floor(low))
        last = min(i for i, width in enumerate(WIDTHS) if width >= high)
        return WIDTHS[max(0, first - 1) : last + 2]

    def _signals(self, evidence: Evidence, known: Signals, same_width: Signals) -> Signals:
        """Compute all signals; those that do not change are taken from what is known."""
        found: Signals = {}
        for signal in SIGNALS:
            earlier = same_width if signal.at_width else known
            if signal.needs == "calibration" or signal.name not in earlier:
                found[signal.name] = signal.compute(evidence, self.layers)
            else:
                found[signal.name] = earlier[signal.name]
        return found

    def _plans(self, bits: float, bank: Bank, signals: Signals) -> Iterator[BitPlan]:
        """Yield all plans of one budget."""
        options = PlanOptions(bits, group_size=self.group_size, base_router=self.base_router)
        levels = options.resolved_levels()
        combined = make_plan(self.reader, self.layers, options, self.source)
        # Of whole experts: every plan is to take the same bytes.
        budget = plan_sizes(combined, self.reader, self.layers).expert_bytes
        for name, attribute in ALLOCATED.items():
            losses = bank.losses(attribute)
            _, widths, _ = allocate({self.group_size: losses}, self.layers, self._widths(), budget)
            yield self._plan(GLOBAL + name, bits, widths)
        if len(levels) == 1:  # every plan by layers is the uniform one
            uniform = PlanOptions(bits, None, "uniform", self.group_size)
            yield make_plan(self.reader, self.layers, uniform, self.source)
            return
        yield combined
        for signal in SIGNALS:
            if signal.name == "final-router-norm" and self.base_router is None:
                continue  # the same as router-norm
            orders = {key: signal.order(found) for key, found in signals[signal.name].items()}
            yield self._ordered(signal.name, bits, levels, orders)
            if signal.name == "router-norm":
                opposite = {key: order[::-1] for key, order in orders.items()}
                yield self._ordered(signal.name + _REVERSED, bits, levels, opposite)
        for seed in range(self.random_plans):
            random = PlanOptions(bits, None, f"random:{seed}", self.group_size)
            yield make_plan(self.reader, self.layers, random, self.source)

    def _is_wanted(self, plan: BitPlan) -> bool:
        name = plan.provenance.strategy
        return name in self.strategies or name not in STRATEGIES

    def _ordered(
        self, strategy: str, bits: float, levels: tuple[int, ...], orders: dict[str, list[int]]
    ) -> BitPlan:
        found = {key: ordered_bits(order, bits, levels) for key, order in orders.items()}
        return self._plan(strategy, bits, found)

    def _plan(self, strategy: str, bits: float, expert_bits: dict[str, LayerBits]) -> BitPlan:
        provenance = Provenance(strategy=strategy, requested_bits=bits, source=self.source)
        return BitPlan(self.group_size, expert_bits, provenance)

    def _point(self, method: str, plan: BitPlan, evaluation: Evaluation) -> Point:
        provenance = plan.provenance
        return Point(
            method=method,
            bits=float(provenance.requested_bits or 0),
            strategy=provenance.strategy,
            plan=plan,
            total_bytes=plan_sizes(plan, self.reader, self.layers).total_bytes,
            evaluation=evaluation,
        )


def _floor(bits: float) -> int:
    """Return the width next below an average, at which damage is compared."""
    return max(width for width in WIDTHS if width <= bits)


def correlations(signals: Signals) -> dict[str, float]:
    """Return Spearman's rank correlation of every signal with the sensitivity, see Findings."""
    from scipy.stats import spearmanr

    result = {}
    for signal in SIGNALS:
        sign = 1 if signal.most_bits_to == "large" else -1
        found = []
        for container, values in signals[signal.name].items():
            wanted = signals["sensitivity"][container]
            if len(set(values)) == 1 or len(set(wanted)) == 1:
                found.append(0.0)  # no order at all
            else:
                found.append(sign * float(spearmanr(values, wanted).statistic))
        result[signal.name] = sum(found) / len(found)
    return result
