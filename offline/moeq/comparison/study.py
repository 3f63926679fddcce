"""Tries every strategy at every budget; each expert is rounded once for each width."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moeq.allocation import PlanOptions, allocate, make_plan, ordered_bits
from moeq.checkpoint import SourceModel
from moeq.checkpoint.fits import check_group_size, fitting_group_size
from moeq.checkpoint.sizes import plan_sizes
from moeq.checkpoint.temporary import check_space, temporary_folder
from moeq.errors import MoeqError
from moeq.evaluation import Evaluation
from moeq.model import layerwise_model
from moeq.model.device import all_devices, local_workers
from moeq.planning import judge
from moeq.planning.cost import measuring_bytes
from moeq.progress import Progress, silent
from moeq.requests import CompareRequest
from moeq.sensitivity import Bank, build, gradients
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
        signals: Those that need calibration are of the last method, quantization errors are at
            the width next below the least average.
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
        source: The model.
        request: What to compare.
        tokens: int64 [n, L]: calibration text.
        heldout: Text to its tokens, int64 [n, L].
        device: Where layers run and experts are rounded.
    """

    source: SourceModel
    request: CompareRequest
    tokens: torch.Tensor
    heldout: dict[str, torch.Tensor]
    device: torch.device

    @property
    def group_size(self) -> int:
        """Weights of a row that share a scale: as asked, or what fits the model."""
        return self.request.group_size or fitting_group_size(self.source.layers)

    def run(self, progress: Progress = silent) -> Findings:
        """Round, plan and judge.

        Args:
            progress: Called after every step.

        Raises:
            MoeqError: Something does not fit the model, or is not finite; names it.
        """
        request, layers = self.request, self.source.layers
        check_strategies(request)
        check_group_size(self.group_size, layers)
        widths = self._widths()
        needed = measuring_bytes(self.source, widths, (self.group_size,), self.tokens.numel())
        model = layerwise_model(self.source, self.device)
        base = None
        if request.base_router is not None:
            base = load_base_routers(request.base_router, layers)
        points: list[Point] = []
        signals: Signals = {}
        at_width: dict[int, Signals] = {}
        with temporary_folder() as work:
            check_space(needed, work)
            for method in request.methods:
                folder = work / method
                folder.mkdir()
                # Anew for each, so that the bank of one at a time is on disk.
                traffic = gradients(model, self.tokens, folder, request.seed, progress)
                bank = build(
                    model, traffic, widths, [self.group_size], method, folder,
                    progress, local_workers(self.source.layers, *all_devices(self.device)),
                )[self.group_size]  # fmt: skip
                for width in sorted({_floor(bits) for bits in request.bits}, reverse=True):
                    evidence = Evidence(model, base, bank, width)
                    signals = self._signals(evidence, signals, at_width.get(width, {}))
                    at_width[width] = signals
                plans = [
                    plan
                    for bits in request.bits
                    for plan in self._plans(bits, bank, at_width[_floor(bits)])
                    if self._is_wanted(plan)
                ]
                sources = [bank.source(plan, self.device) for plan in plans]
                for plan, evaluation in zip(
                    plans, judge(model, sources, self.heldout, progress), strict=True
                ):
                    points.append(self._point(method, plan, evaluation))
                shutil.rmtree(folder)
        return Findings(points, signals, correlations(signals))

    def _widths(self) -> tuple[int, ...]:
        """Return the widths from one below the least average to one above the largest."""
        low, high = min(self.request.bits), max(self.request.bits)
        first = WIDTHS.index(_floor(low))
        last = min(i for i, width in enumerate(WIDTHS) if width >= high)
        return WIDTHS[max(0, first - 1) : last + 2]

    def _signals(self, evidence: Evidence, known: Signals, same_width: Signals) -> Signals:
        """Compute all signals; those that do not change are taken from what is known."""
        signals: Signals = {}
        for signal in SIGNALS:
            earlier = same_width if signal.at_width else known
            if signal.needs == "calibration" or signal.name not in earlier:
                signals[signal.name] = signal.compute(evidence, self.source.layers)
            else:
                signals[signal.name] = earlier[signal.name]
        return signals

    def _plans(self, bits: float, bank: Bank, signals: Signals) -> Iterator[BitPlan]:
        """Yield all plans of one budget."""
        options = PlanOptions(
            bits, group_size=self.group_size, base_router=self.request.base_router
        )
        levels = options.resolved_levels()
        combined = make_plan(self.source, options)
        # Of whole experts: every plan is to take the same bytes.
        budget = plan_sizes(combined, self.source).expert_bytes
        for name, attribute in ALLOCATED.items():
            losses = bank.losses(attribute)
            allocation = allocate(
                {self.group_size: losses}, self.source.layers, self._widths(), budget
            )
            yield self._plan(GLOBAL + name, bits, allocation.expert_bits)
        if len(levels) == 1:  # every plan by layers is the uniform one
            uniform = PlanOptions(bits, None, "uniform", self.group_size)
            yield make_plan(self.source, uniform)
            return
        yield combined
        for signal in SIGNALS:
            if signal.name == "final-router-norm" and self.request.base_router is None:
                continue  # the same as router-norm
            orders = {key: signal.order(values) for key, values in signals[signal.name].items()}
            yield self._ordered(signal.name, bits, levels, orders)
            if signal.name == "router-norm":
                opposite = {key: order[::-1] for key, order in orders.items()}
                yield self._ordered(signal.name + _REVERSED, bits, levels, opposite)
        for seed in range(self.request.random):
            random = PlanOptions(bits, None, f"random:{seed}", self.group_size)
            yield make_plan(self.source, random)

    def _is_wanted(self, plan: BitPlan) -> bool:
        name = plan.provenance.strategy
        return name in (self.request.strategies or STRATEGIES) or name not in STRATEGIES

    def _ordered(
        self, strategy: str, bits: float, levels: tuple[int, ...], orders: dict[str, list[int]]
    ) -> BitPlan:
        widths = {key: ordered_bits(order, bits, levels) for key, order in orders.items()}
        return self._plan(strategy, bits, widths)

    def _plan(self, strategy: str, bits: float, expert_bits: dict[str, LayerBits]) -> BitPlan:
        provenance = Provenance(
            strategy=strategy, requested_bits=bits, source=self.source.public_name
        )
        return BitPlan(self.group_size, expert_bits, provenance)

    def _point(self, method: str, plan: BitPlan, evaluation: Evaluation) -> Point:
        provenance = plan.provenance
        return Point(
            method=method,
            bits=float(provenance.requested_bits or 0),
            strategy=provenance.strategy,
            plan=plan,
            total_bytes=plan_sizes(plan, self.source).total_bytes,
            evaluation=evaluation,
        )


def check_strategies(request: CompareRequest) -> None:
    """Check that there are such strategies.

    Raises:
        MoeqError: There are not; names one.
    """
    for strategy in request.strategies or ():
        if strategy not in STRATEGIES:
            raise MoeqError(f"`strategies`: {strategy!r} is not one of {', '.join(STRATEGIES)}")


def _floor(bits: float) -> int:
    """Return the width next below an average, at which quantization errors are compared."""
    return max(width for width in WIDTHS if width <= bits)


def correlations(signals: Signals) -> dict[str, float]:
    """Return Spearman's rank correlation of every signal with the sensitivity, see Findings."""
    from scipy.stats import spearmanr

    result = {}
    for signal in SIGNALS:
        sign = 1 if signal.most_bits_to == "large" else -1
        coefficients = []
        for container, values in signals[signal.name].items():
            wanted = signals["sensitivity"][container]
            if len(set(values)) == 1 or len(set(wanted)) == 1:
                coefficients.append(0.0)  # no order at all
            else:
                coefficients.append(sign * float(spearmanr(values, wanted).statistic))
        result[signal.name] = sum(coefficients) / len(coefficients)
    return result
