"""Measures what rounding methods cost in held-out loss, at equal bytes.

    python examples/benchmarks/rounding_quality.py MODEL --calib TEXT --text HELDOUT

For models small enough to hold in float32. Every result is a packed checkpoint as `moeq quantize`
writes it; its dequantized experts are copied into the model that transformers loaded.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from plan_quality import PlannedModel, Text, read_texts
from results import RESULTS, table, write_section

from moeq.allocation import PlanOptions, make_plan
from moeq.calibration.calibration import Calibration
from moeq.checkpoint.families import expert_widths
from moeq.checkpoint.reader import CheckpointReader, resolve_model
from moeq.checkpoint.writer import Conversion
from moeq.model.text import calibration_sequences
from moeq.rounding import DATA_FREE, QuantizedWeight
from vllm_moeq.format import BitPlan

PLANS: dict[str, PlanOptions] = {
    "2": PlanOptions(2, None, "uniform"),
    "2.5 (3 and 2, `random:0`)": PlanOptions(2.5, (3, 2), "random:0"),
    "3": PlanOptions(3, None, "uniform"),
    "4": PlanOptions(4, None, "uniform"),
}
REQUIRED = {"2": 0.45, "3": 0.35}
"""Increase of the loss with gptq, relative to that with rtn."""


def load_packed(model: PlannedModel, folder: Path, plan: BitPlan) -> None:
    """Give every expert the weights of a packed checkpoint of the same model."""
    packed, widths = CheckpointReader(folder), expert_widths(plan, model.layers)

    def weight(name: str) -> torch.Tensor:
        stored = QuantizedWeight(*map(packed.tensor, QuantizedWeight.names(name)))
        return stored.dequantize(widths[name])

    model.fill(weight)


def losses(
    model: PlannedModel, texts: list[Text], options: argparse.Namespace
) -> Iterator[tuple[str, str, list[float]]]:
    """Yield the losses of each plan and method: one for each seed where there is a seed."""
    for name, wanted in PLANS.items():
        wanted = PlanOptions(wanted.bits, wanted.levels, wanted.strategy, options.group_size)
        plan = make_plan(model.reader, model.layers, wanted, options.model)
        conversion = Conversion.prepare(model.reader, model.layers, plan)
        for method in (*DATA_FREE, "gptq"):
            values = []
            for seed in range(options.seeds if method == "gptq" else 1):
                rounding = DATA_FREE.get(method)
                if rounding is None:
                    tokens = calibration_sequences(
                        model.reader.folder, options.calib, options.nsamples, options.seqlen, seed
                    )
                    rounding = Calibration(model.reader, model.layers, conversion.plan, tokens)
                with tempfile.TemporaryDirectory(dir=options.work) as folder:
                    output = Path(folder) / "packed"
                    conversion.run(output, options.model, rounding, progress=False)
                    load_packed(model, output, conversion.plan)
                values.append(model.losses(texts).mean)
                print(f"== {name} bits, {method}, seed {seed}: {values[-1]:.4f}", flush=True)
            yield name, method, values


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--calib", required=True, help="calibration text, as in moeq quantize")
    parser.add_argument("--text", required=True, type=Path, help="held-out text file or folder")
    parser.add_argument("--title", help="default: name of the model")
    parser.add_argument("--nsamples", type=int, default=96, help="default 96")
    parser.add_argument("--seqlen", type=int, default=256, help="default 256")
    parser.add_argument("--seeds", type=int, default=5, help="of calibration (default 5)")
    parser.add_argument("--group-size", type=int, default=128, help="default 128")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--work", type=Path, help="folder for checkpoints on the way")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    model = PlannedModel(resolve_model(options.model))
    texts = read_texts(options.text, model.reader.folder, options.max_tokens, 512, 8)
    model.check(texts[0])
    full = model.losses(texts).mean
    found = {(plan, method): values for plan, method, values in losses(model, texts, options)}

    def increase(plan: str, method: str) -> list[float]:
        return [value - full for value in found[plan, method]]

    rows, verdicts = [], []
    for plan in PLANS:
        (rtn,) = increase(plan, "rtn")
        gptq = increase(plan, "gptq")
        mean, spread = statistics.mean(gptq), statistics.stdev(gptq)
        cells = [f"{rtn:+.4f}", f"{increase(plan, 'hqq')[0]:+.4f}", f"{mean:+.4f} ± {spread:.4f}"]
        rows.append([plan, *cells, f"{mean / rtn:.2f}"])
        if plan in REQUIRED:
            meets = "meets" if mean / rtn <= REQUIRED[plan] else "MISSES"
            verdicts.append(
                f"At {plan} bits gptq keeps the increase to {mean / rtn:.2f} of rtn's, which "
                f"{meets} the requirement of {REQUIRED[plan]}."
            )
    write_section(
        options.results,
        f"rounding quality: {options.title or model.reader.folder.name}",
        [
            " ".join(verdicts),
            f"Increase of the held-out loss (nats per token over 16 bits, {full:.4f}), "
            f"{sum(text.tokens for text in texts):,} tokens, group size {options.group_size}. "
            f"gptq: mean and standard deviation over {options.seeds} draws of "
            f"{options.nsamples} × {options.seqlen} calibration tokens.",
            table(["bits", "rtn", "hqq", "gptq", "gptq / rtn"], rows),
        ],
        packages=("torch", "transformers", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
