"""Divergence against the size of the whole file: dense layers chosen with the experts, or left.

    python examples/benchmarks/dense_curve.py MODEL --calib TEXT --text HELDOUT

For each size two measured plans of at most as many bytes, from the same calibration text, judged on
held-out text: one chooses the widths of dense layers, too, in the other they keep 16 bits.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from results import RESULTS, table, write_section

import moeq
from moeq.evaluation import Scores
from moeq.units import parse_size
from vllm_moeq.format import BitPlan

CHOICES: tuple[tuple[str, str | int], ...] = (("chosen", "auto"), ("16 bits", 16))


def measure(
    options: argparse.Namespace, size: str, dense_bits: str | int
) -> tuple[BitPlan, Scores]:
    """Quantize to a size and judge; return the plan and how far it is from the original."""
    with tempfile.TemporaryDirectory() as folder:
        model = moeq.quantize(
            options.model, Path(folder) / "packed", target_size=size, dense_bits=dense_bits,
            calib=options.calib, nsamples=options.nsamples, seqlen=options.seqlen,
        )  # fmt: skip
        total = moeq.evaluate(
            model.path, against=options.model, text=options.text,
            nsamples=options.eval_nsamples, seqlen=options.seqlen,
        ).total  # fmt: skip
    return model.plan, total


def row_of(plan: BitPlan, total: Scores) -> list[str]:
    """Return the figures of a row."""
    widths = Counter(plan.linear_bits.values())
    provenance = plan.provenance
    return [
        f"{provenance.total_bytes or 0:,}",
        f"{provenance.achieved_bits or 0:.3f}",
        ", ".join(f"{widths[bits]} x {bits}" for bits in sorted(widths)) or "none",
        provenance.strategy,
        f"{total.loss - total.original_loss:+.4f}",
        f"{total.divergence:.5f}",
    ]


def title_of(model: Path, plan: BitPlan) -> str:
    """Return the name of a model's folder with its shape: many folders have the same name."""
    experts = {widths.num_experts for widths in plan.expert_bits.values()}
    layers = f"{len(plan.expert_bits)} layers x {'/'.join(map(str, sorted(experts)))} experts"
    return f"{model.resolve().name} ({layers})"


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--sizes", nargs="+", default=["14MB", "16MB", "18MB"], metavar="SIZE")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--eval-nsamples", type=int, default=8)
    parser.add_argument("--title", help="of the section (default: the model's folder and shape)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows, title = [], ""
    for size in sorted(options.sizes, key=lambda size: parse_size(size, "sizes")):
        for name, dense_bits in CHOICES:
            plan, total = measure(options, size, dense_bits)
            title = options.title or title_of(Path(options.model), plan)
            rows.append([size, name, *row_of(plan, total)])
            print(rows[-1], flush=True)
    header = [
        "at most", "dense layers", "bytes", "bits of experts", "dense layers below 16 bits",
        "plan", "loss", "KL",
    ]  # fmt: skip
    write_section(
        options.results, "Quality of plans", f"dense layers: {title}",
        (
            "Two measured plans of each size: one chooses widths of dense layers with those of "
            "experts, in the other dense layers have 16 bits. Loss: increase, KL: from the "
            "original, in nats per token of held-out text.",
            table(header, rows),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
