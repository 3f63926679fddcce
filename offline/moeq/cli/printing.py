"""What the command line prints about plans and checkpoints."""

import json
import math
import os
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from moeq.calibration.calibration import Calibration
from moeq.checkpoint.reader import CheckpointReader, read_json
from moeq.checkpoint.verify import read_plan
from moeq.checkpoint.writer import CALIBRATION_NAME, Conversion
from moeq.comparison import Findings, as_json, as_markdown, render
from moeq.errors import MoeqError
from moeq.evaluation import Evaluation, Scores
from moeq.planning.planner import Candidate, Planner
from moeq.rounding import Rounding
from vllm_moeq.format import BitPlan, FormatError

_CPU_FLOPS = 1e11


def load_plan(path: Path) -> BitPlan:
    """Read ``plan.json``.

    Raises:
        MoeqError: The file is missing or no plan; names it.
    """
    try:
        return BitPlan.from_dict(read_json(path))
    except FormatError as error:
        raise MoeqError(f"{path}: {error}") from error


def write_plan(plan: BitPlan, path: Path) -> None:
    """Write ``plan.json``.

    Raises:
        MoeqError: The file exists or cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(plan.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.link(partial, path)  # unlike a rename, this never replaces an existing file
    except FileExistsError:
        raise MoeqError(f"--output {path} exists already; remove it or choose another") from None
    except OSError as error:
        raise MoeqError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def plan_of(path: Path) -> BitPlan:
    """Return the plan in a file or in a packed checkpoint."""
    return read_plan(CheckpointReader(path)) if path.is_dir() else load_plan(path)


def describe_plan(plan: BitPlan) -> str:
    """Return a plan as text: its averages and sizes, then one line for each layer."""
    provenance = plan.provenance
    rows = [
        ("strategy", provenance.strategy),
        *((name, _text(value)) for name, value in provenance.details.items()),
        ("source", provenance.source),
        ("group size", str(plan.group_size)),
        ("bits requested", _number(provenance.requested_bits)),
        ("bits achieved", _number(provenance.achieved_bits)),
        ("bits per weight", _number(provenance.bits_per_weight) + " with scales and zero points"),
        ("packed experts", _bytes(provenance.expert_bytes)),
        ("all tensors", _bytes(provenance.total_bytes)),
    ]
    lines = [f"{name:<16} {value}" for name, value in rows]
    lines.append("experts at each width, per layer:")
    for container, bits in plan.expert_bits.items():
        text = _widths(bits.w13)
        if bits.w2 != bits.w13:
            text = f"w13 {text}; w2 {_widths(bits.w2)}"
        lines.append(f"  {container}: {text}")
    return "\n".join(lines)


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


def describe_conversion(conversion: Conversion, rounding: Rounding | Calibration) -> str:
    """Return what a conversion will need: files, disk, memory and time."""
    source = sum(info.num_bytes for info in conversion.reader.tensors.values())
    memory = conversion.peak_memory_bytes
    rows = [
        ("source", _bytes(source)),
        ("result", f"{_bytes(conversion.output_bytes)} in {len(conversion.shards)} file(s)"),
    ]
    if isinstance(rounding, Calibration):
        memory, operations = max(memory, rounding.peak_memory_bytes), rounding.operations
        rows += [
            ("disk on the way", f"{_bytes(rounding.disk_bytes)} more than the result"),
            ("time", f"{operations / 1e12:.3g} TFLOP: {_time_class(operations)}"),
        ]
    rows.append(("peak memory", f"about {_bytes(memory)} beyond Python and torch"))
    return "\n".join(f"{name:<16} {value}" for name, value in rows)


def describe_result(rounding: Rounding | Calibration) -> str:
    """Return what there is to know about a rounding that is done."""
    if not isinstance(rounding, Calibration):
        return ""
    counts = [n for coverage in rounding.coverage.values() for n in coverage.tokens]
    text = (
        f"an expert got {median(counts):,.0f} of {rounding.tokens.numel():,} calibration tokens "
        f"(median; fewest {min(counts):,}, most {max(counts):,}; all: {CALIBRATION_NAME})\n"
    )
    if rounding.uncalibrated:
        text += (
            f"{rounding.uncalibrated} of {len(counts)} experts got fewer than "
            f"{rounding.fewest_tokens} calibration tokens and were rounded without them (hqq); "
            "more text helps (--nsamples), or --route-all-experts\n"
        )
    return text


def describe_measurement(planner: Planner) -> str:
    """Return what ``--dry-run`` says about a measurement that it leaves out."""
    rows = [
        ("rounding", _repeats(planner)),
        ("disk", f"{_bytes(planner.disk_bytes)} of temporary files"),
        ("time", f"{planner.operations / 1e12:.3g} TFLOP: {_time_class(planner.operations)}"),
        ("peak memory", f"about {_bytes(planner.peak_memory_bytes)} beyond Python and torch"),
    ]
    return "\n".join(
        [
            "measurement, left out here:",
            *(f"  {name:<14} {value}" for name, value in rows),
            "What follows is for a plan of the same size.",
        ]
    )


def _repeats(planner: Planner) -> str:
    text = f"every expert at {len(planner.widths)} widths"
    groups = len(planner.group_sizes)
    return text if groups == 1 else f"{text}, for each of {groups} group sizes"


def describe_candidates(tried: list[Candidate]) -> str:
    """Return what ``--strategy auto`` tried as text, the best first; empty if it was not asked."""
    if not tried:
        return ""
    lines = [["plan", "expert bytes", "KL", "loss"]]
    for candidate in tried:
        provenance, scores = candidate.plan.provenance, candidate.scores
        lines.append(
            [
                provenance.strategy,
                f"{provenance.expert_bytes:,}",
                f"{scores.divergence:.5f}",
                f"{scores.loss - scores.original_loss:+.5f}",
            ]
        )
    text = _aligned(lines)
    text.append(
        f"tried on {tried[0].scores.tokens:,} tokens held back from the calibration text; KL: from "
        "the original, loss: increase, in nats per token"
    )
    return "\n".join(text) + "\n"


def _aligned(lines: list[list[str]]) -> list[str]:
    """Return lines of a table whose first column is text and whose others are numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]


def write_comparison(folder: Path, findings: Findings, title: str, notes: list[str]) -> None:
    """Write a comparison as page, Markdown and JSON to a new folder.

    Raises:
        MoeqError: It cannot be written, or the page needs a package that is missing.
    """
    files = {
        "compare.html": render(findings, title, notes),
        "compare.md": "\n\n".join([f"# {title}", *notes, as_markdown(findings)]),
        "compare.json": json.dumps(as_json(findings), indent=1) + "\n",
    }
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        raise MoeqError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def _time_class(operations: float) -> str:
    seconds = operations / _CPU_FLOPS
    unit = "minutes" if seconds < 3600 else "hours" if seconds < 86400 else "days"
    return f"{unit} at {_CPU_FLOPS / 1e9:.0f} GFLOP/s"


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
