"""Plans that ``auto`` tries beside the measured one, in as many bytes but for an expert's step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moeq.allocation import PlanOptions, fulfils, make_plan, ordered_bits
from moeq.checkpoint.linear import uniform_linear_bits
from moeq.checkpoint.sizes import with_sizes
from moeq.evaluation import Scores
from moeq.model import LayerwiseModel
from moeq.planning.measurement import Measurement
from moeq.sensitivity import Bank
from moeq.signals.table import PMQ, Evidence
from vllm_moeq._version import __version__
from vllm_moeq.format import BitPlan, Provenance

RANDOM_PLANS = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was tried.

    Attributes:
        plan: Its widths.
        scores: On the text held back.
    """

    plan: BitPlan
    scores: Scores

    def summary(self) -> dict[str, Any]:
        """Return as JSON what there is to say of it: divergence and increase of loss in nats."""
        return {
            "strategy": self.plan.provenance.strategy,
            "expert_bytes": self.plan.provenance.expert_bytes,
            "total_bytes": self.plan.provenance.total_bytes,
            "divergence": self.scores.divergence,
            "loss_increase": self.scores.loss - self.scores.original_loss,
            "tokens": self.scores.tokens,
        }


def unmeasured_plans(measurement: Measurement) -> list[BitPlan]:
    """Return the plans that need no measurement and fulfil what is asked."""
    return [
        plan
        for plan in _unmeasured(measurement)
        if fulfils(plan, measurement.source.layers, measurement.options.constraints)
    ]


def _unmeasured(measurement: Measurement) -> Iterator[BitPlan]:
    source, asked = measurement.source, measurement.options
    plain = PlanOptions(
        asked.bits, asked.levels, group_size=asked.group_size, budget=measurement.budget,
        linear=asked.linear,
    )  # fmt: skip
    if len(plain.resolved_levels()) == 1:  # every plan by layers is the uniform one
        yield make_plan(source, replace(plain, strategy="uniform", levels=None, budget=None))
        return
    routers = {name: getattr(asked, name) for name in ("base_router", "zeta", "maxvar", "reorder")}
    yield make_plan(source, replace(plain, strategy="combined", **routers))
    yield make_plan(source, replace(plain, strategy="maxvar", maxvar=asked.maxvar))
    for seed in range(measurement.seed, measurement.seed + RANDOM_PLANS):
        yield make_plan(source, replace(plain, strategy=f"random:{seed}"))


def routing_plans(measurement: Measurement, model: LayerwiseModel, bank: Bank) -> list[BitPlan]:
    """Return the plan of PMQ, from routing statistics and weight errors, if it is allowed."""
    asked, layers = measurement.options, measurement.source.layers
    levels = asked.resolved_levels()
    if len(levels) == 1:
        return []  # it is the uniform plan
    values = PMQ.compute(Evidence(model, None, bank, min(levels)), layers)
    averages = replace(asked, budget=measurement.budget).layer_bits(layers)
    bits = {
        layer.container: ordered_bits(PMQ.order(values[layer.container]), average, levels)
        for layer, average in zip(layers, averages, strict=True)
    }
    provenance = Provenance(
        strategy=PMQ.name,
        requested_bits=asked.bits,
        source=measurement.source.public_name,
        moeq_version=__version__,
        details={"levels": list(levels)},
    )
    source = measurement.source
    linear = uniform_linear_bits(source.linear, asked.linear, asked.group_size)
    plan = with_sizes(BitPlan(asked.group_size, bits, provenance, linear), source)
    return [plan] if fulfils(plan, layers, asked.constraints) else []
