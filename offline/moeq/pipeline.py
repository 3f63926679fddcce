"""The ways from a request to its result: what ``moeq quantize`` and its kin do, step by step."""

import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moeq.calibration import (
    REPORT_NAME,
    CalibrationConfig,
    CalibrationReport,
    calibrate,
    calibration_cost,
)
from moeq.checkpoint import SourceModel
from moeq.checkpoint.atomic import check_output_is_free, new_folder
from moeq.checkpoint.data_free import DataFree
from moeq.checkpoint.disk_errors import disk_errors
from moeq.checkpoint.fits import check_plan_fits
from moeq.checkpoint.linear import FULL_WIDTH, group_widths, linear_groups
from moeq.checkpoint.packed import PackedReader
from moeq.checkpoint.plan_file import load_plan, write_plan
from moeq.checkpoint.verify import packed_layers, verify_checkpoint
from moeq.checkpoint.workspace import Workspace
from moeq.checkpoint.writer import Conversion, PackedSource
from moeq.comparison import Findings, Study, check_strategies, write_comparison
from moeq.errors import MoeqError
from moeq.evaluation import Evaluation, PackedModel
from moeq.inputs import (
    CalibrationText,
    calibration_text,
    open_model,
    open_to_plan,
    with_group_size,
)
from moeq.model.cost import Cost, at_once
from moeq.model.device import all_devices, local_workers, torch_device
from moeq.model.structure import structure_problems
from moeq.model.text import calibration_sequences, evaluation_sequences
from moeq.planning import (
    MEASUREMENT_NAME,
    Measurement,
    check,
    decide,
    measurement_of,
    measuring_cost,
    stand_in,
    without_stale_claims,
)
from moeq.progress import Progress, silent
from moeq.requests import CompareRequest, EvaluateRequest, PlanRequest, QuantizeRequest
from moeq.result import Estimate, QuantizedModel
from moeq.units import counted, duration, parse_size, public_name
from moeq.workers import PROCESS_BYTES, Cluster, Workers, connected
from vllm_moeq.format import BitPlan

logger = logging.getLogger(__name__)


def quantize(request: QuantizeRequest, progress: Progress = silent) -> QuantizedModel:
    """Write a packed checkpoint.

    Raises:
        MoeqError: Something does not fit the model, or the disk is full; names it.
    """
    check_output_is_free(request.output.absolute())
    job = _prepare(request)
    with connected(request.ray, job.source.folder):
        workers = _workers(job.source, job.text, request.ray, job.estimate)
        if workers is not None:
            job = replace(job, estimate=replace(job.estimate, workers=workers.count))
        if request.dry_run:
            return job.result(job.conversion.plan, written=False)
        return _write(job, workers, progress)


@dataclass(frozen=True, slots=True)
class _Job:
    """A quantization that can start: what is asked fits the model.

    Attributes:
        request: What is asked, with a group size.
        text: To measure the plan and to round with; None if neither needs any.
        measurement: What to measure for the plan; None if it is known.
        conversion: To that plan; or to another one of the same size, before it is measured.
        estimate: What it takes.
    """

    request: QuantizeRequest
    text: CalibrationText | None
    measurement: Measurement | None
    conversion: Conversion
    estimate: Estimate

    @property
    def source(self) -> SourceModel:
        """The model."""
        return self.conversion.source

    def result(
        self, plan: BitPlan, written: bool, coverage: CalibrationReport | None = None
    ) -> QuantizedModel:
        """Return what :func:`quantize` does."""
        in_vllm = not self.source.layers[0].family.encodes
        return QuantizedModel(self.request.output, written, plan, self.estimate, coverage, in_vllm)


def _prepare(request: QuantizeRequest) -> _Job:
    """Open the model, and check that it can become what is asked before anything is written."""
    given = _given_plan(request)
    source = open_to_plan(request, embeddings=request.quantize_embeddings or given is not None)
    if source.layers[0].family.encodes:
        logger.warning(
            "vLLM has no %s: the result runs in transformers, after `import vllm_moeq.hf`",
            source.reader.config["model_type"],
        )
    if given is None:
        request = with_group_size(request, source)
    else:
        check_plan_fits(given, source.layers)
        group_widths(given, source.linear)
    text = calibration_text(request, source)
    measurement = _measurement(request, source, text)
    if given is not None:
        plan = given
    elif measurement is not None:
        plan = stand_in(source, measurement)
    else:
        plan = decide(source, request, None).plan
    conversion = _conversion(request, source, plan, text)
    estimate = _estimate(request, conversion, measurement, text)
    return _Job(request, text, measurement, conversion, estimate)


def _write(job: _Job, workers: Workers | None, progress: Progress) -> QuantizedModel:
    """Measure the plan if needed, round, and write, in a workspace beside the output."""
    request, output = job.request, job.request.output.absolute()
    by_cluster = request.ray is not None and not request.is_calibrated
    writers = Cluster("cpu") if by_cluster else None
    resumes = request.is_calibrated or job.measurement is not None
    then = "go on with `resume`" if resumes else "run the command again"
    with (
        Workspace.open(output, request.resume) as workspace,
        disk_errors(f"cannot write {output}", then),
    ):
        workspace.check_space(job.estimate.disk_bytes)
        _announce(request, job.text, workers, job.estimate.measuring, job.estimate.rounding)
        reports: dict[str, Any] = {}
        conversion = job.conversion
        if job.measurement is not None:
            plan, reports[MEASUREMENT_NAME] = decide(
                job.source, request, job.measurement, workspace.plan, progress, workers
            )
            conversion = _conversion(request, job.source, plan, job.text)
        logger.info("%s", _in_short(conversion.plan))
        weights, coverage = _round(job, conversion, workspace.calibration, workers, progress)
        if coverage is not None:
            reports[REPORT_NAME] = coverage.to_dict()
        conversion.write(workspace.partial, weights, reports, progress, writers)
        workspace.publish()
    return job.result(conversion.plan, written=True, coverage=coverage)


def _round(
    job: _Job, conversion: Conversion, folder: Path, workers: Workers | None, progress: Progress
) -> tuple[PackedSource, CalibrationReport | None]:
    """Round with text, into a folder that outlives a kill; or leave it to when it is written."""
    calibration = _calibration(job.request, conversion, job.text)
    if calibration is None:
        group_size = conversion.plan.group_size
        return DataFree(job.source, job.request.chosen_method, group_size), None
    calibrated = calibrate(calibration, folder, job.request.resume, progress, workers)
    return calibrated, calibrated.report


def plan(request: PlanRequest, progress: Progress = silent) -> BitPlan:
    """Decide the width of every expert; write ``plan.json`` if there is an output.

    Raises:
        MoeqError: Something does not fit the model; names it.
    """
    if request.output is not None:
        check_output_is_free(request.output)
    source = open_to_plan(request, request.quantize_embeddings)
    request = with_group_size(request, source)
    text = calibration_text(request, source)
    measurement = _measurement(request, source, text)
    workers = _workers(source, text)
    cost = None if measurement is None else measuring_cost(measurement)
    _announce(request, text, workers, cost, None)
    result = decide(source, request, measurement, None, progress, workers).plan
    if request.output is not None:
        write_plan(result, request.output)
    return result


def evaluate(request: EvaluateRequest, progress: Progress = silent) -> Evaluation:
    """Judge a packed checkpoint on held-out text.

    Raises:
        MoeqError: It does not come from the original, or the backend cannot run it.
    """
    original = open_model(request.against, embeddings=True)
    device = torch_device(request.device)
    packed = PackedModel.open(request.packed, original)
    sequences = evaluation_sequences(
        original.folder, request.text, request.nsamples, request.seqlen, request.seed
    )
    return packed.evaluate(sequences, request.backend, device, request.dtype, progress)


def compare(request: CompareRequest, progress: Progress = silent) -> Findings:
    """Try every strategy at every average; write a page, Markdown and JSON.

    Raises:
        MoeqError: Something does not fit the model, or a package is missing; names it.
    """
    check_strategies(request)
    if find_spec("matplotlib") is None:
        raise MoeqError("the page needs matplotlib: pip install 'vllm-moeq[report]'")
    device = torch_device(request.device)
    with new_folder(request.output.absolute()) as folder:
        source = open_model(request.model).asked_for(FULL_WIDTH)
        tokens = calibration_sequences(
            source.folder, request.calib, request.nsamples, request.seqlen, request.seed
        )
        heldout = evaluation_sequences(
            source.folder, request.text, request.eval_nsamples, tokens.shape[1], 0
        )
        study = Study(source, request, tokens, heldout, device)
        findings = study.run(progress)
        write_comparison(
            folder, replace(request, group_size=study.group_size), findings, tokens, heldout
        )
    return findings


def verify(folder: Path) -> list[str]:
    """Check a packed checkpoint: its files, its experts, and then all other tensors.

    Returns:
        One sentence for each problem; empty if the checkpoint is sound.

    Raises:
        MoeqError: The folder is no finished moeq checkpoint, or a file cannot be read at all.
    """
    problems = verify_checkpoint(folder)
    if problems:  # experts of unknown sizes can be compared with nothing
        return problems
    reader = PackedReader(folder)
    layers = packed_layers(reader)
    try:
        group_widths(reader.plan, linear_groups(reader, layers, embeddings=True))
    except MoeqError as error:
        return [str(error)]
    return structure_problems(reader, layers)


def _workers(
    source: SourceModel,
    text: CalibrationText | None,
    ray: str | None = None,
    estimate: Estimate | None = None,
) -> Workers | None:
    """Return who runs and rounds experts with text: all GPUs that are asked for, or a cluster."""
    if text is None:
        return None
    if ray is None:
        return local_workers(source.layers, *all_devices(text.device))
    costs = (estimate.measuring, estimate.rounding) if estimate else ()
    memory = PROCESS_BYTES + max((cost.worker_bytes for cost in costs if cost), default=0)
    cores = torch.get_num_threads() // at_once(source.layers, text.device)  # as they are here
    return Cluster(text.device.type, cores, memory)


def _measurement(
    request: PlanRequest, source: SourceModel, text: CalibrationText | None
) -> Measurement | None:
    """Return what has to be measured for the plan, checked."""
    if text is None or not request.is_measured:
        return None
    measurement = measurement_of(source, request, text.tokens, text.device)
    check(measurement)
    return measurement


def _announce(
    request: PlanRequest,
    text: CalibrationText | None,
    workers: Workers | None,
    measuring: Cost | None,
    rounding: Cost | None,
) -> None:
    """Say which text is used and how long it takes, since nobody may have asked for either."""
    if text is None or workers is None:
        return
    count, length = text.tokens.shape
    name = "the manual of Python" if request.text == "default" else public_name(str(request.text))
    logger.info("calibration text: %d x %d tokens of %s", count, length, name)
    parts = {"measuring the plan": measuring, "rounding": rounding}
    costs = {word: cost for word, cost in parts.items() if cost}
    seconds = sum(cost.seconds(text.device, workers.count) for cost in costs.values())
    logger.info(
        "%s takes about %s with %s; without text it is much faster: `calib` none",
        " and ".join(costs), duration(seconds), counted(workers.count, "worker"),
    )  # fmt: skip


def _in_short(plan: BitPlan) -> str:
    """Return a plan in a line."""
    provenance = plan.provenance
    return (
        f"plan: {provenance.strategy}, {provenance.achieved_bits:.4g} bits on average, "
        f"{(provenance.expert_bytes or 0) / 1e6:,.2f} MB of experts, "
        f"{(provenance.total_bytes or 0) / 1e6:,.2f} MB in all"
    )


def _given_plan(request: QuantizeRequest) -> BitPlan | None:
    if request.plan is None:
        return None
    plan = load_plan(request.plan) if isinstance(request.plan, Path) else request.plan
    return without_stale_claims(plan, request.chosen_method)


def _conversion(
    request: QuantizeRequest, source: SourceModel, plan: BitPlan, text: CalibrationText | None
) -> Conversion:
    shard_bytes = parse_size(request.max_shard_size, "max_shard_size")
    note = request.chosen_method
    if request.is_calibrated and text is not None:
        count, length = text.tokens.shape
        name = public_name(str(request.text))
        note = f"gptq, {count} x {length} tokens of {name}, seed {request.seed}"
        if request.route_all_experts:
            note += ", every expert by all tokens"
    return Conversion.prepare(source, plan, shard_bytes).noting("rounding", note)


def _calibration(
    request: QuantizeRequest, conversion: Conversion, text: CalibrationText | None
) -> CalibrationConfig | None:
    if not request.is_calibrated or text is None:
        return None
    return CalibrationConfig(
        conversion.source, conversion.plan, text.tokens, str(text.device),
        request.route_all_experts,
    )  # fmt: skip


def _estimate(
    request: QuantizeRequest,
    conversion: Conversion,
    measurement: Measurement | None,
    text: CalibrationText | None,
) -> Estimate:
    calibration = _calibration(request, conversion, text)
    measuring = None if measurement is None else measuring_cost(measurement)
    rounding = None if calibration is None else calibration_cost(calibration)
    memory = [conversion.memory_bytes]
    memory += [cost.memory_bytes for cost in (measuring, rounding) if cost is not None]
    return Estimate(
        conversion.source.num_bytes,
        conversion.output_bytes,
        len(conversion.shards),
        max(memory),
        measuring,
        rounding,
    )
