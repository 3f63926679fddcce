"""Measures what quantization costs on held-out text, over several draws of calibration text.

    python examples/benchmarks/quality.py MODEL --calib TEXT --text HELDOUT

Every figure comes from a packed checkpoint as `moeq quantize` writes it, judged as `moeq eval`
does. For every strategy at equal bytes in one go, see `moeq compare`.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from results import RESULTS, table, write_section

import moeq
from moeq.requests import METHODS


class Setting(NamedTuple):
    """How a checkpoint is quantized; ``strategy`` random stands for ``random:DRAW``."""

    bits: float
    method: str
    strategy: str

    def quantize(self, options: argparse.Namespace, draw: int, output: Path) -> moeq.QuantizedModel:
        """Write a packed checkpoint, with the draw as the seed of everything drawn."""
        strategy = f"random:{draw}" if self.strategy == "random" else self.strategy
        measured = self.strategy in ("auto", "sensitivity")
        text = {}
        if self.method == "gptq" or measured:
            text = {"nsamples": options.nsamples, "seqlen": options.seqlen, "seed": draw}
            text["calib"] = options.calib
        return moeq.quantize(
            options.model, output, bits=self.bits, method=self.method, strategy=strategy,
            group_size=options.group_size, dense_bits=16, **text,
        )  # fmt: skip


class Figures(NamedTuple):
    """Of one setting, for each draw, in nats per token."""

    expert_bytes: int
    increases: list[float]
    divergences: list[float]


def measure(setting: Setting, options: argparse.Namespace) -> Figures:
    """Quantize and judge once for each draw."""
    size, increases, divergences = 0, [], []
    for draw in range(options.draws):
        with tempfile.TemporaryDirectory() as folder:
            model = setting.quantize(options, draw, Path(folder) / "packed")
            total = moeq.evaluate(
                model.path, against=options.model, text=options.text,
                nsamples=options.eval_nsamples, seqlen=options.seqlen,
            ).total  # fmt: skip
        size = model.plan.provenance.expert_bytes or 0
        increases.append(total.loss - total.original_loss)
        divergences.append(total.divergence)
        print(f"{setting} draw {draw}: {increases[-1]:+.4f}, KL {divergences[-1]:.5f}", flush=True)
    return Figures(size, increases, divergences)


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Yield what is compared: uniform plans only at whole widths, and mixed ones between them."""
    for bits in options.bits:
        for method in options.methods:
            for strategy in options.strategies:
                if (strategy == "uniform") == bits.is_integer():
                    yield Setting(bits, method, strategy)


def spread(values: list[float], form: str) -> str:
    """Return the mean and the standard deviation over draws."""
    text = format(statistics.mean(values), form)
    return f"{text} ± {statistics.stdev(values):{form.strip('+')}}" if len(values) > 1 else text


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--calib", default="default", help="calibration text")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--title", help="default: name of the model")
    parser.add_argument("--bits", nargs="+", type=float, default=[2.0, 2.5, 3.0, 4.0])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"], choices=METHODS)
    parser.add_argument("--strategies", nargs="+", default=["uniform", "random", "auto"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--draws", type=int, default=3, help="of calibration text (default 3)")
    parser.add_argument("--nsamples", type=int, default=96, help="default 96")
    parser.add_argument("--seqlen", type=int, default=256, help="default 256")
    parser.add_argument("--eval-nsamples", type=int, default=8, help="of each text (default 8)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    rows = []
    for setting in settings(options):
        figures = measure(setting, options)
        rows.append(
            [
                f"{setting.bits:g}, {setting.strategy}, {setting.method}",
                f"{figures.expert_bytes:,}",
                spread(figures.increases, "+.4f"),
                spread(figures.divergences, ".5f"),
            ]
        )
    write_section(
        options.results,
        "Quality of plans",
        f"quality: {options.title or Path(options.model).resolve().name}",
        [
            f"Increase of the held-out loss and divergence (KL) from the original in nats per "
            f"token, mean and standard deviation over {options.draws} draws of {options.nsamples} "
            f"× {options.seqlen} calibration tokens; group size {options.group_size}.",
            table(["bits, plan, rounding", "expert bytes", "loss", "KL"], rows),
        ],
        ("torch", "transformers", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
