"""From what the user asks of a plan to the plan."""

from pathlib import Path

import torch

from moeq.allocation import (
    Constraints,
    PlanOptions,
    average_bits,
    bits_per_weight_budget,
    make_plan,
    target_size_budget,
)
from moeq.checkpoint import SourceModel
from moeq.checkpoint.sizes import plan_sizes
from moeq.errors import MoeqError
from moeq.planning.measurement import Measurement
from moeq.planning.planner import Decision, measured_plan, resumable_plan
from moeq.planning.stamp import stamped
from moeq.progress import Progress, silent
from moeq.requests import DEFAULT_BITS, PlanRequest
from moeq.units import parse_size
from vllm_moeq.format import WIDTHS, BitPlan

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
    bits, budget = _size(source, request)
    return Measurement(
        source, _options(request, bits, budget), tokens, request.chosen_method, device,
        request.seed,
    )  # fmt: skip


def decide(
    source: SourceModel,
    request: PlanRequest,
    measurement: Measurement | None,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Decision:
    """Decide the width of every expert.

    Args:
        source: The model.
        request: What is asked.
        measurement: What to measure for it; None for a strategy that needs no text.
        folder: Keeps what is finished of a measurement, so that it can be resumed; None keeps
            nothing.
        progress: Hears of what is done.

    Raises:
        MoeqError: What is asked does not fit the model; says what would.
    """
    bits, budget = _size(source, request)
    if measurement is None:
        decision = Decision(make_plan(source, _options(request, bits, budget)), None)
    elif folder is None:
        decision = measured_plan(measurement, progress)
    else:
        decision = resumable_plan(measurement, folder, progress)
    _check_size(decision.plan, source, request, budget)
    return Decision(stamped(decision.plan, request.chosen_method), decision.report)


def stand_in(source: SourceModel, measurement: Measurement) -> BitPlan:
    """Return a plan of the size of a measured one, to tell what rounding will take."""
    asked, budget = measurement.options, measurement.budget
    options = PlanOptions(asked.bits, None, "random:0", asked.group_size, budget=budget)
    return make_plan(source, options)


def _options(request: PlanRequest, bits: float, budget: int | None) -> PlanOptions:
    sizes = request.group_sizes
    return PlanOptions(
        bits=bits,
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
        budget=budget,
    )


def _size(source: SourceModel, request: PlanRequest) -> tuple[float, int | None]:
    """Return the average width asked for, and the bytes of experts if those were asked for."""
    layers, group_size = source.layers, max(request.group_sizes)
    if request.bits_per_weight is not None:
        budget = bits_per_weight_budget(request.bits_per_weight, layers, group_size)
    elif request.target_size is not None:
        target = parse_size(request.target_size, "target_size")
        budget = target_size_budget(target, source, group_size)
    else:
        return float(DEFAULT_BITS if request.bits is None else request.bits), None
    average = min(average_bits(budget, layers, group_size), max(request.levels or WIDTHS))
    if average < min(request.levels or WIDTHS):
        option = "target_size" if request.bits_per_weight is None else "bits_per_weight"
        raise MoeqError(
            f"`{option}` {getattr(request, option)} leaves {average:.4g} bits to an expert weight, "
            f"less than the smallest of `levels` {','.join(map(str, request.levels or ()))}"
        )
    if request.chosen_strategy == "uniform":
        average = max(width for width in WIDTHS if width <= average)
    return average, budget


def _check_size(
    plan: BitPlan, source: SourceModel, request: PlanRequest, budget: int | None
) -> None:
    size = plan_sizes(plan, source).expert_bytes
    if budget is not None and size > budget:
        raise MoeqError(
            f"`strategy` {request.chosen_strategy} cannot stay within {budget:,} bytes of experts "
            f"at these widths: its plan takes {size:,}; ask for a little less"
        )
