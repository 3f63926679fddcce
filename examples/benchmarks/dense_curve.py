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
from moeq.units import parse_size

CHOICES: tuple[tuple[str, str | int], ...] = (("chosen", "auto"), ("16 bits", 16))


def measure(options: argparse.Namespace, size: str, dense_bits: str | int) -> list[object]:
    """Quantize to a size and judge; return a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        model = moeq.quantize(
            options.model, Path(folder) / "packed", target_size=size, dense_bits=dense_bits,
            calib=options.calib, nsamples=options.nsamples, seqlen=options.seqlen,
        )  # fmt: skip
        total = moeq.evaluate(
            model.path, against=options.model, text=options.text,
            nsamples=options.eval_nsamples, seqlen=options.seqlen,
        ).total  # fmt: skip
    widths = Counter(model.plan.linear_bits.values())
    provenance = model.plan.provenance
    return [
        f"{provenance.total_bytes or 0:,}",
        f"{provenance.achieved_bits or 0:.3f}",
        ", ".join(f"{widths[bits]} x {bits}" for bits in sorted(widths)) or "none",
        provenance.strategy,
        f"{total.loss - total.original_loss:+.4f}",
        f"{total.divergence:.5f}",
    ]


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
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for size in sorted(options.sizes, key=lambda size: parse_size(size, "sizes")):
        for name, dense_bits in CHOICES:
            rows.append([size, name, *measure(options, size, dense_bits)])
            print(rows[-1], flush=True)
    header = [
        "at most", "dense layers", "bytes", "bits of experts", "dense layers below 16 bits",
        "plan", "loss", "KL",
    ]  # fmt: skip
    write_section(
        options.results, "Quality of plans",
        f"dense layers: {Path(options.model).resolve().name}",
        (
            "Two measured plans of each size: one chooses widths of dense layers with those of "
            "experts, in the other dense layers have 16 bits. Loss: increase, KL: from the "
            "original, in nats per token of held-out text.",
            table(header, rows),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
