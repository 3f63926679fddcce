"""What the command line prints about plans and checkpoints."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from moeq.calibration import REPORT_NAME, CalibrationReport
from moeq.checkpoint.wording import linear_summary, size_of_tried
from moeq.evaluation import Evaluation, Scores
from moeq.model.cost import Cost
from moeq.result import Estimate, QuantizedModel
from moeq.units import counted, duration
from vllm_moeq.format import BitPlan

_HIDDEN = ("tried", "digest", "method")
"""Details that are shown otherwise, or not for people."""
_RULES = ("combined", "router-norm")
"""Strategies that go by router norms alone or first."""


def describe_plan(plan: BitPlan) -> str:
    """Return a plan as text: its averages and sizes, then one line for each layer."""
    provenance = plan.provenance
    rows = [
        ("strategy", provenance.strategy),
        *(
            (name, _text(value))
            for name, value in provenance.details.items()
            if name not in _HIDDEN
        ),
        ("source", provenance.source),
        ("group size", str(plan.group_size)),
        ("bits requested", _number(provenance.requested_bits)),
        ("bits achieved", _number(provenance.achieved_bits)),
        ("bits per weight", _number(provenance.bits_per_weight) + " of experts, with scales"),
        ("packed experts", _bytes(provenance.expert_bytes)),
        ("dense layers", linear_summary(plan)),
        ("all tensors", _bytes(provenance.total_bytes)),
    ]
    lines = [f"{name:<16} {value}" for name, value in rows]
    lines.append("experts at each width, per layer:")
    for container, bits in plan.expert_bits.items():
        text = _widths(bits.w13)
        if bits.w2 != bits.w13:
            text = f"w13 {text}; w2 {_widths(bits.w2)}"
        lines.append(f"  {container}: {text}")
    if provenance.strategy in _RULES:
        lines.append(
            "note: on the models we measured, this rule was not clearly better than random plans, "
            "and measured plans were (--calib)"
        )
    return "\n".join([*lines, *_tried(provenance.details.get("tried", []))])


def plan_summary(plan: BitPlan) -> dict[str, Any]:
    """Return a plan as JSON for programs: the plan itself and the counts of each layer."""
    return {
        **plan.to_dict(),
        "experts_at_width": {
            container: {
                "w13": dict(sorted(Counter(map(str, bits.w13)).items())),
                "w2": dict(sorted(Counter(map(str, bits.w2)).items())),
            }
            for container, bits in plan.expert_bits.items()
        },
    }


def describe_estimate(estimate: Estimate, device: torch.device) -> str:
    """Return what a quantization needs: files, disk, memory and time."""
    rows = [
        ("source", _bytes(estimate.source_bytes)),
        ("result", f"{_bytes(estimate.output_bytes)} in {estimate.output_files} file(s)"),
    ]
    for name, cost in (("measuring", estimate.measuring), ("calibrating", estimate.rounding)):
        if cost is not None:
            rows.append((name, _cost(cost, device, estimate.workers)))
    rows.append(("peak memory", f"about {_bytes(estimate.memory_bytes)} beyond Python and torch"))
    return "\n".join(f"{name:<16} {value}" for name, value in rows)


def _cost(cost: Cost, device: torch.device, workers: int | None) -> str:
    time = duration(cost.seconds(device, workers))
    who = "" if workers is None else f" with {counted(workers, 'worker')}"
    return f"about {time}{who}, {_bytes(cost.disk_bytes)} of temporary files"


def estimate_summary(estimate: Estimate, device: torch.device) -> dict[str, Any]:
    """Return an estimate as JSON for programs."""
    workers = estimate.workers

    def summary(cost: Cost | None) -> dict[str, float] | None:
        if cost is None:
            return None
        return {**cost._asdict(), "seconds": cost.seconds(device, workers)}

    return {
        "source_bytes": estimate.source_bytes,
        "output_bytes": estimate.output_bytes,
        "output_files": estimate.output_files,
        "memory_bytes": estimate.memory_bytes,
        "measuring": summary(estimate.measuring),
        "rounding": summary(estimate.rounding),
        "workers": workers,
    }


def model_summary(model: QuantizedModel, device: torch.device) -> dict[str, Any]:
    """Return a quantized model as JSON for programs."""
    return {
        "path": str(model.path),
        "written": model.written,
        "plan": plan_summary(model.plan),
        "estimate": estimate_summary(model.estimate, device),
        "uncalibrated_experts": model.calibration and model.calibration.uncalibrated,
        "reports": [str(path) for path in model.reports],
    }


def describe_calibration(report: CalibrationReport) -> str:
    """Return what the experts got of the calibration text."""
    counts = report.token_counts
    lines = [
        f"an expert got {median(counts):,.0f} of {report.tokens:,} calibration tokens "
        f"(median; fewest {min(counts):,}, most {max(counts):,}; all: {REPORT_NAME})"
    ]
    if report.uncalibrated:
        lines.append(
            f"{report.uncalibrated} of {len(counts)} experts got fewer than "
            f"{report.fewest_tokens} calibration tokens and were rounded without them (hqq); "
            "more text helps (--nsamples), or --route-all-experts"
        )
    return "\n".join(lines)


def _tried(tried: list[Mapping[str, Any]]) -> list[str]:
    """Return what ``auto`` tried as lines, the best first; none if it was not asked."""
    if not tried:
        return []
    size = size_of_tried(tried)
    lines = [["plan", size.replace("_", " "), "KL", "loss"]]
    for plan in tried:
        lines.append(
            [
                plan["strategy"],
                f"{plan[size]:,}",
                f"{plan['divergence']:.5f}",
                f"{plan['loss_increase']:+.5f}",
            ]
        )
    return [
        *_aligned(lines),
        f"tried on {tried[0]['tokens']:,} tokens held back from the calibration text; KL: from the "
        "original, loss: increase, in nats per token",
    ]


def _aligned(lines: list[list[str]]) -> list[str]:
    """Return lines of a table whose first column is text and whose others are numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]


def describe_evaluation(evaluation: Evaluation) -> str:
    """Return an evaluation as text: a line for each text, and how routing shifts."""
    lines = [["text", "tokens", "16 bits", "packed", "loss", "KL", "same top"]]
    texts = dict(evaluation.texts)
    if len(texts) > 1:
        texts["all"] = evaluation.total
    for name, scores in texts.items():
        lines.append(
            [
                name,
                f"{scores.tokens:,}",
                f"{math.exp(scores.original_loss):.4f}",
                f"{scores.perplexity:.4f}",
                f"{scores.loss - scores.original_loss:+.4f}",
                f"{scores.divergence:.5f}",
                f"{scores.agreement:.1%}",
            ]
        )
    text = _aligned(lines)
    text.append(
        "16 bits, packed: perplexity; loss: increase in nats per token; KL: from the original, in "
        "nats per token; same top: places with the same likeliest token"
    )
    if evaluation.routing_shift:
        text.append("routing shift (choices of the original's router that are not made any more):")
        text += [f"  {name}: {shift:.2%}" for name, shift in evaluation.routing_shift.items()]
    return "\n".join(text)


def evaluation_summary(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as JSON for programs."""

    def summary(scores: Scores) -> dict[str, float]:
        return {**asdict(scores), "perplexity": scores.perplexity}

    return {
        "total": summary(evaluation.total),
        "texts": {name: summary(scores) for name, scores in evaluation.texts.items()},
        "routing_shift": dict(evaluation.routing_shift),
    }


def _widths(widths: tuple[int, ...]) -> str:
    counts = sorted(Counter(widths).items(), reverse=True)
    return ", ".join(f"{count} x {width} bit" for width, count in counts)


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "unknown"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit} ({value:,} bytes)"
    return f"{value} bytes"
