"""Measures what the change of the routers says about a FINE-TUNED model, end to end.

    python examples/benchmarks/fine_tuning.py MODEL [--frequent TEXT --rare TEXT]

Fine-tunes a small model on a frequent text with a little of a rare one mixed in and records its
routers on the way; makes plans from their change since the pretrained checkpoint, and from
everything that `moeq compare` knows; and judges every plan on both texts. The default texts suit
the model of the quickstart: source code of Python's library (of which it knows only docstrings),
and the headers of Python's C interface.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from results import RESULTS, table, write_section
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeq import RouterNormTracker
from moeq.checkpoint.reader import CheckpointReader, resolve_model
from moeq.comparison import Findings, Point, Study
from moeq.model.text import read_texts, tokenized

sys.path.append(str(Path(__file__).resolve().parents[1]))
from corpus import c_headers, source_code
from train_tiny_moe import take_step

SEQUENCE, BATCH = 128, 16
LEARNING_RATE, WARM_UP = 1e-3, 50
FREQUENT, RARE = "frequent", "rare"
BITS = 2.5
_HELD_OUT_EVERY = 10


def windows(folder: Path, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a text into sequences int64 [n, SEQUENCE]; return those to learn and those held out."""
    (tokens,) = tokenized(folder, {"text": text}).values()
    sequences = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    held_out = torch.arange(len(sequences)) % _HELD_OUT_EVERY == 0
    return sequences[~held_out], sequences[held_out]


def drawn(sequences: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw sequences."""
    return sequences[torch.randint(len(sequences), (count,), generator=generator)]


def fine_tune(
    source: Path, output: Path, learned: dict[str, torch.Tensor], share: float, steps: int
) -> None:
    """Fine-tune a model; write output/model and output/routers.safetensors.

    Args:
        source: The pretrained checkpoint.
        output: Folder to create.
        learned: Sequences of both texts, int64 [n, SEQUENCE].
        share: Of the rare text.
        steps: Of BATCH sequences each.
    """
    output.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    model.config.output_router_logits = True  # for the loss that balances experts
    tracker = RouterNormTracker(output / "routers.safetensors", model, every=20)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP, 2 * (1 - step / steps))
        rare = int((torch.rand(BATCH, generator=generator) < share).sum())
        parts = ((FREQUENT, BATCH - rare), (RARE, rare))
        batch = torch.cat([drawn(learned[name], count, generator) for name, count in parts])
        found = take_step(model, optimizer, batch)
        tracker.step()
        if step % 50 == 0:
            print(f"step {step:5} of {steps}  loss {found:.3f}", flush=True)
    tracker.save()
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(output / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(output / "model")


@torch.inference_mode()
def loss(folder: Path, sequences: torch.Tensor) -> float:
    """Return the mean loss of a 16-bit model in nats per token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [model(input_ids=part, labels=part).loss.item() for part in sequences.split(1)]
    return statistics.mean(losses)


def by_strategy(points: list[Point]) -> dict[str, list[Point]]:
    """Return points by strategy, all random plans together; the best on the rare text first."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        name = "random" if point.strategy.startswith("random:") else point.strategy
        groups.setdefault(name, []).append(point)
    return dict(sorted(groups.items(), key=lambda item: divergence(item[1], RARE)))


def divergence(points: list[Point], text: str) -> float:
    """Return the mean divergence of plans on a text."""
    return statistics.mean(point.evaluation.texts[text].divergence for point in points)


def increase(points: list[Point], text: str) -> float:
    """Return the mean increase of the loss of plans on a text."""
    scores = [point.evaluation.texts[text] for point in points]
    return statistics.mean(score.loss - score.original_loss for score in scores)


def strategy_rows(findings: Findings) -> Iterator[list[str]]:
    """Yield the cells of each strategy."""
    groups = by_strategy(findings.points)
    for name, points in groups.items():
        row = [name if len(points) == 1 else f"{name} ({len(points)} plans)"]
        for text in (FREQUENT, RARE):
            values = [point.evaluation.texts[text].divergence for point in points]
            spread = f" ± {statistics.stdev(values):.5f}" if len(values) > 1 else ""
            share = divergence(points, text) / divergence(groups["random"], text)
            row += [f"{statistics.mean(values):.5f}{spread}", f"{share:.0%}"]
            row.append(f"{increase(points, text):+.5f}")
        yield row


def verdict(findings: Findings) -> str:
    """Say what the rule by router norms brings on each text."""
    groups = by_strategy(findings.points)
    told = []
    for text in (FREQUENT, RARE):
        usual = divergence(groups["random"], text)
        shares = {name: divergence(points, text) / usual for name, points in groups.items()}
        best = min(shares, key=lambda name: shares[name])
        told.append(
            f"on the {text} text the rule by the change of router norms leaves "
            f"{shares['router-norm']:.0%} of the divergence of random plans (reversed: "
            f"{shares['router-norm reversed']:.0%}; with MaxVar: {shares['combined']:.0%}), "
            f"{best} {shares[best]:.0%}"
        )
    return f"At {BITS} bits, {'; '.join(told)}."


def main() -> None:
    """Fine-tune, compare, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub id of a small pretrained model")
    parser.add_argument("--frequent", help="text, as --calib of moeq quantize takes it")
    parser.add_argument("--rare", help="text, in the same forms")
    parser.add_argument("--share", type=float, default=0.05, help="of the rare text (default 0.05)")
    parser.add_argument("--steps", type=int, default=800, help="default 800")
    parser.add_argument("--title", help="default: name of the model")
    parser.add_argument("--nsamples", type=int, default=192, help="default 192")
    parser.add_argument("--eval-nsamples", type=int, default=64, help="of each text (default 64)")
    parser.add_argument("--random", type=int, default=5, help="random plans (default 5)")
    parser.add_argument("--group-size", type=int, default=128, help="default 128")
    parser.add_argument("--work", type=Path, help="where a temporary folder for the model is to be")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    source = resolve_model(options.model)
    texts = {
        FREQUENT: source_code() if options.frequent is None else _text(options.frequent),
        RARE: c_headers() if options.rare is None else _text(options.rare),
    }
    parts = {name: windows(source, text) for name, text in texts.items()}
    for name, part in parts.items():
        if not len(part[1]):
            parser.error(f"the {name} text is too short; give another one with --{name}")
    learned = {name: part[0] for name, part in parts.items()}
    generator = torch.Generator().manual_seed(1)
    heldout = {
        name: part[1][torch.randperm(len(part[1]), generator=generator)[: options.eval_nsamples]]
        for name, part in parts.items()
    }
    rare = round(options.nsamples * options.share)
    calibration = torch.cat(
        [
            drawn(learned[name], count, generator)
            for name, count in ((FREQUENT, options.nsamples - rare), (RARE, rare))
        ]
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        output = Path(work) / "fine-tuned"
        fine_tune(source, output, learned, options.share, options.steps)
        reader = CheckpointReader(output / "model")
        study = Study(
            reader, source.layers, options.model, str(output / "routers.safetensors"),
            (BITS,), ("gptq",), options.group_size, options.random, calibration, heldout,
            torch.device("cpu"),
        )  # fmt: skip
        findings = study.run()
        before, after = (
            {name: loss(folder, part) for name, part in heldout.items()}
            for folder in (source, output / "model")
        )
    write_section(
        options.results,
        f"fine-tuning: {options.title or source.name}",
        [
            verdict(findings),
            f"Fine-tuned for {options.steps} steps of {BATCH} × {SEQUENCE} tokens, "
            f"{options.share:.0%} of them rare; held-out loss before and after: "
            + ", ".join(f"{name} {before[name]:.3f} and {after[name]:.3f}" for name in texts)
            + f". Plans of equal bytes, {BITS} bits, GPTQ on {len(calibration)} sequences in the "
            f"same mixture, group size {options.group_size}; judged on "
            f"{' and '.join(f'{part.numel():,} {name}' for name, part in heldout.items())} "
            "tokens. KL: from the fine-tuned model, in nats per token; of random: its share of "
            "that of random plans; loss: increase; ±: standard deviation over random plans.",
            table(
                ["strategy"]
                + [f"{text}: {what}" for text in texts for what in ("KL", "of random", "loss")],
                strategy_rows(findings),
            ),
        ],
        packages=("torch", "transformers", "vllm-moeq"),
    )


def _text(source: str) -> str:
    return "\n\n".join(read_texts(source).values())


if __name__ == "__main__":
    main()
