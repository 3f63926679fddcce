"""From what the user asks of a plan to the plan."""

from pathlib import Path
from typing import NamedTuple

import torch

from moeq.allocation import (
    Constraints,
    PlanOptions,
    average_bits,
    file_budget,
    file_bytes,
    fits_file,
    make_plan,
)
from moeq.checkpoint import SourceModel
from moeq.checkpoint.linear import FULL_WIDTH
from moeq.checkpoint.sizes import plan_sizes
from moeq.errors import MoeqError
from moeq.planning.measurement import Measurement
from moeq.planning.planner import Decision, measured_plan, resumable_plan
from moeq.planning.stamp import stamped
from moeq.progress import Progress, silent
from moeq.requests import DEFAULT_BITS, PlanRequest
from moeq.units import parse_size
from moeq.workers import Workers
from vllm_moeq.format import WIDTHS, BitPlan

_CHOSEN_FROM = (8, 4)
"""Width of dense layers of the plans beside one that chooses it for each: the first that fits."""
_RANK_TOLERANCE = 0.01
"""Expert-parallel ranks of equal bytes may differ from their mean by this share of it."""


def measurement_of(
    source: SourceModel, request: PlanRequest, tokens: torch.Tensor, device: torch.device
) -> Measurement:
    """Return what has to be measured for a plan that is to be measured.

    Args:
        source: The model.
        request: What is asked.
        tokens: int64 [n, L]: calibration text.
        device: Where to measure.

    Raises:
        MoeqError: The size that was asked for does not fit the model.
    """
    options = _options(request, _size(source, request))
    return Measurement(source, options, tokens, request.chosen_method, device, request.seed)


def decide(
    source: SourceModel,
    request: PlanRequest,
    measurement: Measurement | None,
    folder: Path | None = None,
    progress: Progress = silent,
    workers: Workers | None = None,
) -> Decision:
    """Decide the width of every expert, and of dense layers.

    Args:
        source: The model.
        request: What is asked.
        measurement: What to measure for it; None for a strategy that needs no text.
        folder: Keeps what is finished of a measurement, so that it can be resumed; None keeps
            nothing.
        progress: Called after every step.
        workers: Measure experts; by default the device of the measurement does.

    Raises:
        MoeqError: What is asked does not fit the model; says what would.
    """
    size = _size(source, request)
    if measurement is None:
        decision = Decision(make_plan(source, _options(request, size)), None)
    elif folder is None:
        decision = measured_plan(measurement, progress, workers)
    else:
        decision = resumable_plan(measurement, folder, progress, workers)
    _check_size(decision.plan, source, request, size)
    return Decision(stamped(decision.plan, request.chosen_method), decision.report)


def stand_in(source: SourceModel, measurement: Measurement) -> BitPlan:
    """Return a plan of the size of a measured one, to tell what rounding will take."""
    asked, budget = measurement.options, measurement.budget
    options = PlanOptions(
        asked.bits, None, "random:0", asked.group_size, budget=budget, linear=asked.linear
    )
    return make_plan(source, options)


def _options(request: PlanRequest, size: "_Size") -> PlanOptions:
    sizes = request.group_sizes
    return PlanOptions(
        bits=size.bits,
        levels=request.levels,
        strategy=request.chosen_strategy,
        group_size=max(sizes),
        group_sizes=sizes if len(sizes) > 1 else None,
        base_router=request.base_router,
        zeta=request.zeta,
        maxvar=request.maxvar,
        reorder=request.reorder,
        constraints=Constraints(
            layer_tolerance=request.layer_tolerance,
            widths_per_layer=request.widths_per_layer,
            ranks=request.ranks,
            rank_tolerance=_RANK_TOLERANCE if request.ranks > 1 else 0.0,
            same_width=request.same_width,
        ),
        budget=size.budget,
        linear=size.linear,
        chooses_linear=request.chosen_dense_bits is None,
    )


class _Size(NamedTuple):
    """What is asked of the size.

    Attributes:
        bits: Average width of the experts.
        budget: Bytes of all packed experts, if bytes were asked for.
        linear: Width of the dense layers beside them.
        target: Bytes of the whole checkpoint, if those were asked for.
    """

    bits: float
    budget: int | None
    linear: int
    target: int | None


def _size(source: SourceModel, request: PlanRequest) -> _Size:
    """Return what is asked of the size; where dense layers are chosen, with one width for all."""
    layers, group_size, width = source.layers, max(request.group_sizes), request.chosen_dense_bits
    if width not in (None, FULL_WIDTH) and layers[0].family.encodes:
        raise MoeqError(
            f"`dense_bits` {width}: dense layers of {source.reader.config['model_type']} stay in "
            "16 bits; leave it out"
        )
    widths = _CHOSEN_FROM if width is None else (width,)
    if request.bits_per_weight is not None:
        option = "bits_per_weight"
        target = file_bytes(request.bits_per_weight, source)
    elif request.target_size is not None:
        option = "target_size"
        target = parse_size(request.target_size, option)
    else:
        bits = DEFAULT_BITS if request.bits is None else request.bits
        return _Size(float(bits), None, widths[0], None)
    asked = f"`{option}` {getattr(request, option)}"
    levels = request.levels or WIDTHS
    linear = next(
        (
            width
            for width in widths[:-1]
            if fits_file(target, source, group_size, linear=width, widths=levels)
        ),
        widths[-1],
    )
    budget = file_budget(target, source, group_size, linear=linear, asked=asked)
    average = min(average_bits(budget, layers, group_size), max(request.levels or WIDTHS))
    if average < min(request.levels or WIDTHS):
        raise MoeqError(
            f"{asked} leaves {average:.4g} bits to an expert weight, less than the smallest of "
            f"`levels` {','.join(map(str, request.levels or ()))}"
        )
    if request.chosen_strategy == "uniform":
        average = max(width for width in WIDTHS if width <= average)
    return _Size(average, budget, linear, target)


def _check_size(plan: BitPlan, source: SourceModel, request: PlanRequest, size: _Size) -> None:
    total = plan_sizes(plan, source).total_bytes
    if size.target is not None and total > size.target:
        raise MoeqError(
            f"`strategy` {request.chosen_strategy} cannot stay within {size.target:,} bytes at "
            f"these widths: its plan takes {total:,}; ask for a little less"
        )
