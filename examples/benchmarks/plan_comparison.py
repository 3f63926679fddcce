"""Measures which strategy wins at equal bytes on a model, as `moeq compare` does.

python examples/benchmarks/plan_comparison.py MODEL --calib TEXT --text HELDOUT
"""

import argparse
from pathlib import Path

import torch
from results import RESULTS, write_section

from moeq.checkpoint.reader import CheckpointReader, resolve_model
from moeq.comparison import Study, as_markdown
from moeq.model.text import calibration_sequences, evaluation_sequences


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--calib", required=True, help="calibration text, as in moeq compare")
    parser.add_argument("--text", required=True, help="held-out text, in the same forms")
    parser.add_argument("--base-router", metavar="SOURCE", help="as in moeq compare")
    parser.add_argument("--title", help="default: name of the model")
    parser.add_argument("--bits", nargs="+", type=float, default=[2, 2.5, 3])
    parser.add_argument("--methods", nargs="+", default=["gptq"], help="default gptq")
    parser.add_argument("--nsamples", type=int, default=96, help="default 96")
    parser.add_argument("--seqlen", type=int, default=256, help="default 256")
    parser.add_argument("--eval-nsamples", type=int, default=8, help="of each text (default 8)")
    parser.add_argument("--random", type=int, default=5, help="random plans (default 5)")
    parser.add_argument("--group-size", type=int, default=128, help="default 128")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    reader = CheckpointReader(resolve_model(options.model))
    folder, length = reader.folder, options.seqlen
    tokens = calibration_sequences(folder, options.calib, options.nsamples, length, 0)
    heldout = evaluation_sequences(folder, options.text, options.eval_nsamples, length, 0)
    study = Study(
        reader, source.layers, options.model, options.base_router, tuple(options.bits),
        tuple(options.methods), options.group_size, options.random, tokens, heldout,
        torch.device("cpu"),
    )  # fmt: skip
    findings = study.run()
    judged = sum(part.numel() for part in heldout.values())
    write_section(
        options.results,
        f"plan comparison: {options.title or folder.name}",
        [
            "Which strategy wins at equal bytes? Every expert is rounded once at each width, "
            f"group size {options.group_size}, calibrated on {len(tokens)} × {length} tokens; "
            f"judged on {judged:,} held-out tokens. KL: from the original, in nats per token; "
            "loss: increase, in nats per token; ±: standard deviation over random plans.",
            as_markdown(findings).strip(),
        ],
        packages=("torch", "transformers", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
