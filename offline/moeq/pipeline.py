"""The ways from a request to its result: what ``moeq quantize`` and its kin do, step by step."""

import logging
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from moeq.calibration import REPORT_NAME, CalibrationConfig, calibrate, calibration_cost
from moeq.checkpoint import SourceModel
from moeq.checkpoint.atomic import check_output_is_free, new_folder
from moeq.checkpoint.data_free import DataFree
from moeq.checkpoint.disk_errors import disk_errors
from moeq.checkpoint.fits import check_group_size, check_plan_fits, fitting_group_size
from moeq.checkpoint.linear import FULL_WIDTH, group_widths, linear_groups, lost_integers
from moeq.checkpoint.packed import PackedReader
from moeq.checkpoint.plan_file import load_plan, write_plan
from moeq.checkpoint.servable import not_added
from moeq.checkpoint.verify import packed_layers, verify_checkpoint
from moeq.checkpoint.workspace import Workspace
from moeq.checkpoint.writer import Conversion, PackedSource
from moeq.comparison import Findings, Study, check_strategies, write_comparison
from moeq.errors import MoeqError
from moeq.evaluation import Evaluation, PackedModel
from moeq.model.cost import Cost, at_once
from moeq.model.device import all_devices, local_workers, torch_device
from moeq.model.structure import check_structure, structure_problems
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
from vllm_moeq.format import GROUP_SIZES, BitPlan

logger = logging.getLogger(__name__)

AnyPlanRequest = TypeVar("AnyPlanRequest", bound=PlanRequest)


class _Text(NamedTuple):
    """Calibration text as tokens int64 [n, L], and where to run them."""

    tokens: torch.Tensor
    device: torch.device


def quantize(request: QuantizeRequest, progress: Progress = silent) -> QuantizedModel:
    """Write a packed checkpoint.

    Raises:
        MoeqError: Something does not fit the model, or the disk is full; names it.
    """
    output = request.output.absolute()
    check_output_is_free(output)
    given = _given_plan(request)
    embeddings = request.quantize_embeddings or given is not None
    source = _opened(request.model, embeddings).asked_for(_copied_bits(request))
    _check_embeddings(request, source)
    in_vllm = not source.layers[0].family.encodes
    if not in_vllm:
        logger.warning(
            "vLLM has no %s: the result runs in transformers, after `import vllm_moeq.hf`",
            source.reader.config["model_type"],
        )
    if given is None:
        request = _with_group_size(request, source)
    else:
        check_plan_fits(given, source.layers)
        group_widths(given, source.linear)
    text = _calibration_text(request, source)
    measurement = _measurement(request, source, text)
    # Of the right size, before a measured plan is known.
    expected = given or (
        decide(source, request, None).plan if measurement is None else stand_in(source, measurement)
    )
    conversion = _conversion(request, source, expected, text)
    estimate = _estimate(request, conversion, measurement, text)
    resumes = request.is_calibrated or measurement is not None
    then = "go on with `resume`" if resumes else "run the command again"
    with connected(request.ray, source.folder):
        workers = _workers(source, text, request.ray, estimate)
        if workers is not None:
            estimate = replace(estimate, workers=workers.count)
        if request.dry_run:
            return QuantizedModel(request.output, False, conversion.plan, estimate, in_vllm=in_vllm)
        by_cluster = request.ray is not None and not request.is_calibrated
        writers = Cluster("cpu") if by_cluster else None
        with (
            Workspace.open(output, request.resume) as workspace,
            disk_errors(f"cannot write {output}", then),
        ):
            workspace.check_space(estimate.disk_bytes)
            _announce(request, text, workers, estimate.measuring, estimate.rounding)
            reports: dict[str, Any] = {}
            if measurement is not None:
                plan, reports[MEASUREMENT_NAME] = decide(
                    source, request, measurement, workspace.plan, progress, workers
                )
                conversion = _conversion(request, source, plan, text)
            logger.info("%s", _in_short(conversion.plan))
            calibration = _calibration(request, conversion, text)
            report = None
            experts: PackedSource
            if calibration is None:
                experts = DataFree(source, request.chosen_method, conversion.plan.group_size)
            else:
                experts = calibrated = calibrate(
                    calibration, workspace.calibration, request.resume, progress, workers
                )
                report = calibrated.report
                reports[REPORT_NAME] = report.to_dict()
            conversion.write(workspace.partial, experts, reports, progress, writers)
            workspace.publish()
    return QuantizedModel(request.output, True, conversion.plan, estimate, report, in_vllm)


def plan(request: PlanRequest, progress: Progress = silent) -> BitPlan:
    """Decide the width of every expert; write ``plan.json`` if there is an output.

    Raises:
        MoeqError: Something does not fit the model; names it.
    """
    if request.output is not None:
        check_output_is_free(request.output)
    source = _opened(request.model, request.quantize_embeddings).asked_for(_copied_bits(request))
    _check_embeddings(request, source)
    request = _with_group_size(request, source)
    text = _calibration_text(request, source)
    measurement = _measurement(request, source, text)
    workers = _workers(source, text)
    _announce(
        request, text, workers, None if measurement is None else measuring_cost(measurement), None
    )
    result = decide(source, request, measurement, None, progress, workers).plan
    if request.output is not None:
        write_plan(result, request.output)
    return result


def evaluate(request: EvaluateRequest, progress: Progress = silent) -> Evaluation:
    """Judge a packed checkpoint on held-out text.

    Raises:
        MoeqError: It does not come from the original, or the backend cannot run it.
    """
    original = _opened(request.against, embeddings=True)
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
        source = _opened(request.model).asked_for(FULL_WIDTH)
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


def _opened(model: str, embeddings: bool = False) -> SourceModel:
    """Open a source and check that it is whole; see :meth:`SourceModel.open`."""
    source = SourceModel.open(model, embeddings)
    check_structure(source.reader, source.layers)
    if source.left_out:
        logger.warning(
            "%s: %d tensors of prediction layers are left out, the first is %s: %s",
            source.folder,
            len(source.left_out),
            source.left_out[0],
            "it is not known where vLLM looks for them, and it might not start"
            if source.layers[0].family.derived
            else "vLLM has none for this model and would not start",
        )
    bias = not_added(source.reader.config)
    if bias is not None and source.reader.tensor(bias).any():
        logger.warning(
            "%s: vLLM does not add %s, packed or not: its answers are not those of transformers",
            source.folder,
            bias,
        )
    return source


def _copied_bits(request: PlanRequest) -> str | int:
    """Return with which width dense layers of the source may be copied."""
    # What they take would depend on the group size that a plan chooses.
    return FULL_WIDTH if len(request.group_sizes) > 1 else request.dense_bits


def _check_embeddings(request: PlanRequest, source: SourceModel) -> None:
    if request.quantize_embeddings and not any(group.embeds for group in source.linear):
        raise MoeqError(
            f"{source.folder}: embeddings of this model stay in 16 bits: tokens and the output "
            "head share one matrix, prediction layers use them, too, their rows are no multiple "
            "of 32, or they have other names. Leave `quantize_embeddings` out"
        )


def _with_group_size(request: AnyPlanRequest, source: SourceModel) -> AnyPlanRequest:
    """Take a group size if none is asked for; refuse what cannot be packed before text is read."""
    if request.group_size is None:
        group_size = fitting_group_size(source.layers)
        request = replace(request, group_size=group_size)
        if group_size != max(GROUP_SIZES):
            logger.info("group size: %d, which fits the sizes of the experts best", group_size)
    for group_size in request.group_sizes:
        check_group_size(group_size, source.layers)
        layer = max(source.layers, key=lambda layer: layer.added_columns(group_size))
        added = layer.added_columns(group_size)
        if added:
            logger.info(
                "group size %d does not divide the intermediate_size %d: serving takes the memory "
                "of %d",
                group_size, layer.intermediate_size, layer.intermediate_size + added,
            )  # fmt: skip
    largest = max(request.group_sizes)
    for group in lost_integers(source.linear, largest)[:1]:
        logger.info(
            "group size %d does not divide that of dense layers of %d bits in the source, %d: they "
            "are dequantized",
            largest, group.stored_bits, group.stored_group_size,
        )  # fmt: skip
    return request


def _calibration_text(request: PlanRequest, source: SourceModel) -> _Text | None:
    if not request.uses_text or request.text is None:
        return None
    device = torch_device(request.device)
    tokens = calibration_sequences(
        source.folder, request.text, request.nsamples, request.seqlen, request.seed
    )
    return _Text(tokens, device)


def _workers(
    source: SourceModel,
    text: _Text | None,
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
    request: PlanRequest, source: SourceModel, text: _Text | None
) -> Measurement | None:
    """Return what has to be measured for the plan, checked."""
    if text is None or not request.is_measured:
        return None
    measurement = measurement_of(source, request, text.tokens, text.device)
    check(measurement)
    return measurement


def _announce(
    request: PlanRequest,
    text: _Text | None,
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
    request: QuantizeRequest, source: SourceModel, plan: BitPlan, text: _Text | None
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
    request: QuantizeRequest, conversion: Conversion, text: _Text | None
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
    text: _Text | None,
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
