"""Plans that are right on the user's own model: measured, and judged on text held back."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from moeq.allocation import expert_counts
from moeq.checkpoint.atomic import replace_file
from moeq.checkpoint.disk_errors import disk_errors
from moeq.checkpoint.fits import check_group_size
from moeq.checkpoint.resume import begin, read_note, remove
from moeq.checkpoint.temporary import temporary_folder
from moeq.planning.candidates import Candidate, routing_plans, unmeasured_plans
from moeq.planning.judge import judge
from moeq.planning.measured import MeasuredModel
from moeq.planning.measurement import Measurement
from moeq.progress import Progress, silent
from moeq.workers import Workers
from vllm_moeq.format import BitPlan

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
    measurement.possible_group_sizes()


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
    judges = len(measurement.held_back) > 0
    unmeasured = unmeasured_plans(measurement) if judges else []  # first: they may not fit
    measured = MeasuredModel.measure(measurement, folder, progress, workers)
    plan = measured.least_loss()
    if judges:
        others = unmeasured + _measured_alternatives(measured)
        plan = _best(measured, [plan, *others], progress)
    return Decision(plan, measured.report(plan))


def _measured_alternatives(measured: MeasuredModel) -> list[BitPlan]:
    """Return the plans to try beside that of least loss that follow from what was measured."""
    bank = measured.banks[max(measured.banks)]
    plans = routing_plans(measured.measurement, measured.model, bank)
    if measured.measurement.options.chooses_linear and measured.linear is not None:
        plans += measured.least_loss_beside_full_width()
    return plans


def _best(measured: MeasuredModel, plans: list[BitPlan], progress: Progress) -> BitPlan:
    """Judge plans on the text held back; return the best, which tells of all."""
    plans = _different(plans)
    sources = [measured.source(plan) for plan in plans]
    text = {"held back": measured.measurement.held_back}
    evaluations = judge(measured.model, sources, text, progress)
    tried = [
        Candidate(plan, evaluation.total)
        for plan, evaluation in zip(plans, evaluations, strict=True)
    ]
    tried.sort(key=lambda candidate: candidate.scores.divergence)
    best = tried[0].plan
    details = {**best.provenance.details, "tried": [candidate.summary() for candidate in tried]}
    provenance = replace(
        best.provenance, strategy=f"auto: {best.provenance.strategy}", details=details
    )
    return replace(best, provenance=provenance)


def _different(plans: list[BitPlan]) -> list[BitPlan]:
    """Leave out plans whose widths are those of an earlier one."""
    widths = [(plan.group_size, plan.expert_bits, plan.linear_bits) for plan in plans]
    return [plan for i, plan in enumerate(plans) if widths[i] not in widths[:i]]
