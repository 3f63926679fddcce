"""Plans that are right on the user's own model: measured, and judged on text held back."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeq.allocation import (
    EXPERTS_ONLY,
    LINEAR_OPTIONS,
    LinearChoice,
    allocate,
    expert_counts,
    possible_group_sizes,
)
from moeq.checkpoint import MoELayer
from moeq.checkpoint.atomic import replace_file
from moeq.checkpoint.disk_errors import disk_errors
from moeq.checkpoint.fits import check_group_size
from moeq.checkpoint.linear import FULL_WIDTH, group_widths, uniform_linear_bits
from moeq.checkpoint.resume import begin, read_note, remove
from moeq.checkpoint.sizes import with_sizes
from moeq.checkpoint.temporary import check_space, temporary_folder
from moeq.errors import MoeqError
from moeq.model import layerwise_model
from moeq.planning.candidates import Candidate, routing_plans, unmeasured_plans
from moeq.planning.judge import judge
from moeq.planning.measurement import Measurement
from moeq.progress import Progress, silent
from moeq.sensitivity import Bank, Choice, LinearBank, QuantizationError, build, gradients
from moeq.workers import Workers
from vllm_moeq._version import __version__
from vllm_moeq.format import PROJECTIONS, BitPlan, Projection, Provenance

logger = logging.getLogger(__name__)


def check(measurement: Measurement) -> None:
    """Find out in a moment, from headers alone, what could fail after hours.

    Raises:
        MoeqError: Options that do not fit the model, or too little text.
    """
    measurement.check_text()
    source, options = measurement.source, measurement.options
    for group_size in measurement.group_sizes:
        check_group_size(group_size, source.layers)
    options.constraints.check(len(source.layers))
    if options.strategy == "auto" and options.levels is not None:  # for the plans that it tries
        expert_counts(options.bits, options.levels, source.layers[0].num_experts)
    _possible(measurement)


def _possible(measurement: Measurement) -> list[int]:
    """Return the group sizes with which there is a plan."""
    return possible_group_sizes(
        measurement.group_sizes, measurement.source.layers, measurement.widths, measurement.budget,
        measurement.options.constraints,
    )  # fmt: skip


class Decision(NamedTuple):
    """A plan, and what is known about it.

    Attributes:
        plan: Widths of the experts; its provenance lists what ``auto`` tried, the best first.
        report: As JSON: what was measured of each expert at its width; None if nothing was.
    """

    plan: BitPlan
    report: dict[str, Any] | None


def measured_plan(
    measurement: Measurement, progress: Progress = silent, workers: Workers | None = None
) -> Decision:
    """Return the plan that was measured, by workers or on the measurement's device.

    Raises:
        MoeqError: As :func:`check`; weights or activations that are not finite; or a full disk.
    """
    with temporary_folder() as folder:
        return _measure(measurement, folder, progress, workers)


def resumable_plan(
    measurement: Measurement,
    folder: Path,
    progress: Progress = silent,
    workers: Workers | None = None,
) -> Decision:
    """Do the same in a folder that outlives a kill, and go on with what is there.

    Args:
        measurement: What is asked.
        folder: Gets what is finished, and at last only the plan; it is created.
        progress: Called after every step.
        workers: As of :func:`measured_plan`.

    Raises:
        MoeqError: As :func:`measured_plan`; or what is there is of another plan.
    """
    kept, unfinished = folder / "plan.json", folder / "measurement"
    with disk_errors(f"cannot measure in {folder}", "go on with `resume`"):
        folder.mkdir(exist_ok=True)
        begin(folder / "fingerprint.json", measurement.fingerprint())
        if kept.exists():
            logger.info("going on with the plan that was measured before")
            stored = read_note(kept)
            return Decision(BitPlan.from_dict(stored["plan"]), stored["report"])
        unfinished.mkdir(exist_ok=True)
        try:
            decision = _measure(measurement, unfinished, progress, workers)
        except BaseException:  # Ctrl-C, too
            if not any(unfinished.glob("*/*.json")):  # nothing to go on with
                remove(folder)
            raise
        text = json.dumps({"plan": decision.plan.to_dict(), "report": decision.report})
        replace_file(kept, lambda target: target.write_text(text))
    shutil.rmtree(unfinished, ignore_errors=True)
    return decision


def _measure(
    measurement: Measurement, folder: Path, progress: Progress, workers: Workers | None
) -> Decision:
    """Measure, choose and judge."""
    others = unmeasured_plans(measurement) if len(measurement.held_back) else []
    group_sizes = _possible(measurement)
    for path in folder.glob("*.bin"):  # activations of a killed run, which are made anew
        path.unlink()
    check_space(measurement.cost().disk_bytes, folder)
    model = layerwise_model(measurement.source, measurement.device)
    tokens = measurement.measured
    linear = None
    if measurement.linear:
        linear = LinearBank(
            model, measurement.linear, measurement.linear_widths, group_sizes, measurement.method,
            tokens.numel(), folder,
        )  # fmt: skip
    traffic = gradients(model, tokens, folder, measurement.seed, progress, linear)
    banks = build(
        model, traffic, measurement.widths, group_sizes, measurement.method, folder, progress,
        workers,
    )  # fmt: skip
    best = _least_loss(measurement, banks, linear)
    if not len(measurement.held_back):
        return Decision(best, _report(best, banks, linear, measurement))
    others += routing_plans(measurement, model, banks[max(banks)])
    if measurement.options.chooses_linear and linear is not None:
        others += _with_dense_layers_as_they_are(measurement, banks)
    plans = _different([best, *others])
    sources = [banks[plan.group_size].source(plan, measurement.device, linear) for plan in plans]
    judged = judge(model, sources, {"held back": measurement.held_back}, progress)
    tried = [
        Candidate(plan, evaluation.total) for plan, evaluation in zip(plans, judged, strict=True)
    ]
    tried.sort(key=lambda candidate: candidate.scores.divergence)
    winner = tried[0].plan
    provenance = replace(
        winner.provenance,
        strategy=f"auto: {winner.provenance.strategy}",
        details={
            **winner.provenance.details,
            "tried": [candidate.summary() for candidate in tried],
        },
    )
    winner = replace(winner, provenance=provenance)
    return Decision(winner, _report(winner, banks, linear, measurement))


def _different(plans: list[BitPlan]) -> list[BitPlan]:
    """Leave out plans whose widths are those of an earlier one."""
    widths = [(plan.group_size, plan.expert_bits, plan.linear_bits) for plan in plans]
    return [plan for i, plan in enumerate(plans) if widths[i] not in widths[:i]]


def _report(
    plan: BitPlan,
    banks: Mapping[int, Bank],
    linear: LinearBank | None,
    measurement: Measurement,
) -> dict[str, Any]:
    """Return as JSON what was measured of each expert and dense layer at the widths of a plan."""
    bank = banks[plan.group_size]

    def errors(layer: MoELayer, projection: Projection) -> dict[str, list[float]]:
        bits = plan.expert_bits[layer.container]
        of_experts = [
            bank.errors[Choice(layer.container, expert, projection, bits.width(projection, expert))]
            for expert in range(layer.num_experts)
        ]
        return {name: [getattr(e, name) for e in of_experts] for name in QuantizationError._fields}

    return {
        "tokens": measurement.measured.numel(),
        "method": measurement.method,
        "experts": {
            layer.container: {
                "errors": {projection: errors(layer, projection) for projection in PROJECTIONS},
                "frequency": [expert.frequency for expert in bank.routing[layer.container]],
                "router_weight": [expert.weight for expert in bank.routing[layer.container]],
            }
            for layer in bank.layers
        },
        "dense": {
            " + ".join(group.weights): {
                "bits": width,
                "loss": linear.loss(group, plan.group_size, width),
            }
            for group, width in group_widths(plan, measurement.source.linear).items()
            if group in linear.groups
        }
        if linear is not None
        else {},
    }


def _least_loss(
    measurement: Measurement, banks: Mapping[int, Bank], linear: LinearBank | None
) -> BitPlan:
    """Return the plan of least estimated loss within the budget."""
    choice = EXPERTS_ONLY
    if linear is not None:
        widths = measurement.linear_widths
        if measurement.options.chooses_linear:
            widths = LINEAR_OPTIONS
        losses = {
            group_size: np.array(
                [
                    [
                        linear.loss(group, group_size, bits)
                        if bits in widths and bits == group.width(bits, group_size)
                        else np.inf
                        for bits in LINEAR_OPTIONS
                    ]
                    for group in linear.groups
                ]
            )
            for group_size in banks
        }
        choice = LinearChoice(linear.groups, losses)
    return _allocated(measurement, banks, measurement.total_budget, choice, "sensitivity")


def _with_dense_layers_as_they_are(
    measurement: Measurement, banks: Mapping[int, Bank]
) -> list[BitPlan]:
    """Return the plan of least loss in as many bytes, if one is left, with dense layers of 16 bits.

    So a measured plan that chooses them is not worse than one that does not.
    """
    budget = measurement.budget_beside(FULL_WIDTH)
    try:
        plan = _allocated(
            measurement, banks, budget, EXPERTS_ONLY, "sensitivity, dense layers of 16 bits"
        )
    except MoeqError:
        logger.info("there is no plan of this size with dense layers of 16 bits")
        return []
    return [plan]


def _allocated(
    measurement: Measurement,
    banks: Mapping[int, Bank],
    budget: int,
    linear: LinearChoice,
    strategy: str,
) -> BitPlan:
    source, options = measurement.source, measurement.options
    tables = {group_size: bank.losses("loss") for group_size, bank in banks.items()}
    allocation = allocate(
        tables, source.layers, measurement.widths, budget, options.constraints, linear
    )
    provenance = Provenance(
        strategy=strategy,
        requested_bits=options.bits,
        source=source.public_name,
        moeq_version=__version__,
        details={
            "widths": list(measurement.widths),
            "group_sizes": list(measurement.group_sizes),
            "constraints": str(options.constraints),
            "estimated_divergence": allocation.solution.loss,
            "gap_to_the_best_plan": allocation.solution.gap,
        },
    )
    rest = [group for group in source.linear if group not in linear.groups]
    dense = allocation.linear_bits | uniform_linear_bits(rest, FULL_WIDTH, allocation.group_size)
    plan = BitPlan(allocation.group_size, allocation.expert_bits, provenance, dense)
    return with_sizes(plan, source)
