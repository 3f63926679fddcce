"""Train a small Switch Transformer to sum up Python functions, quantize it in many ways, judge all.

    python examples/switch_summarization.py OUTPUT [--seconds 90] [--results FILE]

The text is the standard library of the Python that runs this. The model learns to go on with text,
then to predict the first line of a function's docstring from its code, while
``moeq.RouterNormTracker`` watches: the paper's rule wants the change of router norms in
fine-tuning. Every plan is a packed checkpoint, calibrated with training pairs, which transformers
runs on the kernels of ``vllm_moeq``. A Switch Transformer is what the paper starts with; vLLM has
none.
"""

import argparse
import ast
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from byte_bpe import train_byte_bpe
from corpus import docstrings, library_files, manual
from tokenizers import processors
from torchmetrics.functional.text.rouge import rouge_score
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import moeq
import vllm_moeq.hf  # noqa: F401  (packed checkpoints in transformers)
from vllm_moeq.format import BitPlan, LayerBits

# results.py lies with the benchmarks.
sys.path.append(str(Path(__file__).resolve().parent / "benchmarks"))

from results import table, write_section

VOCABULARY = 2048
PAD, END = 0, 1
SOURCE, TARGET = 72, 23
"""Tokens; with the decoder's first token they make the 96 of a sequence, a quarter the target."""
BATCH = 16
PEAK_LEARNING_RATE = 6e-3
WARM_UP = 0.05
AUXILIARY = 0.01
"""Weight of the loss that keeps experts equally busy."""
HELD_OUT_EVERY = 12
"""One file of the library in so many is held out."""
HIGH, LOW = 3, 2
"""The widths of every mixed plan but the measured one."""


class Pair(NamedTuple):
    """The code of a function without its docstring, and the first line of that."""

    source: str
    target: str


class Rouge(NamedTuple):
    """F1 scores from 0 to 1: of words, of pairs of words, of the longest common subsequence."""

    rouge_1: float
    rouge_2: float
    rouge_l: float


class Scores(NamedTuple):
    """How one model did on held-out pairs: loss in nats per token of the target."""

    bytes: int
    loss: float
    rouge: Rouge


def pairs_of(path: Path) -> Iterator[Pair]:
    """Yield the pairs of a file of Python."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # lib2to3 keeps files that are broken on purpose
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            line = text.split("\n")[0].strip()
            node.body = node.body[1:] or [ast.Pass()]
            if 15 <= len(line) <= 100:
                yield Pair(ast.unparse(node), line)


def split_pairs() -> tuple[list[Pair], list[Pair]]:
    """Return (pairs to learn from, held-out pairs) of other files, each target once."""
    halves: tuple[dict[str, Pair], dict[str, Pair]] = ({}, {})
    for number, path in enumerate(library_files()):
        for pair in pairs_of(path):
            halves[number % HELD_OUT_EVERY == 0].setdefault(pair.target, pair)
    training, held_out = halves
    return list(training.values()), [held_out[line] for line in held_out.keys() - training.keys()]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that ends each text, as that of T5 does."""
    tokenizer = train_byte_bpe(texts, VOCABULARY, ["<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def new_model() -> SwitchTransformersForConditionalGeneration:
    """Return an untrained model of 3.4 million parameters, 2.1 of them in 32 experts."""
    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=VOCABULARY,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_heads=4,
            num_layers=4,
            num_sparse_encoder_layers=2,
            num_decoder_layers=4,
            num_sparse_decoder_layers=2,
            num_experts=8,
            expert_capacity=SOURCE,
            dropout_rate=0.0,
            router_jitter_noise=0.0,
            router_aux_loss_coef=AUXILIARY,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
        )
    )
    with torch.no_grad():
        # T5's start is made for Adafactor; AdamW takes long to move weights that large.
        for name, parameter in model.named_parameters():
            if name.startswith("shared") or "router" in name:
                parameter.mul_(0.1)
    return model


def filled(rows: list[list[int]], length: int) -> torch.Tensor:
    """Return tokens int64 [n, length], cut or filled."""
    return torch.tensor([row[:length] + [PAD] * (length - len(row)) for row in rows])


class Batch(NamedTuple):
    """Tokens int64 [n, SOURCE] and [n, TARGET]."""

    source: torch.Tensor
    target: torch.Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> "Batch":
        """Tokenize pairs."""
        sources, targets = (
            tokenizer(list(texts))["input_ids"] for texts in zip(*pairs, strict=True)
        )
        return cls(filled(sources, SOURCE), filled(targets, TARGET))

    def arguments(self) -> dict[str, torch.Tensor]:
        """Return what a model of transformers is called with."""
        return {
            "input_ids": self.source,
            "attention_mask": (self.source != PAD).long(),
            "labels": self.target.masked_fill(self.target == PAD, -100),
        }


def train(
    model: SwitchTransformersForConditionalGeneration,
    draw: Callable[[], Batch],
    seconds: float,
    tracker: moeq.RouterNormTracker | None = None,
) -> None:
    """Train for a time on batches; the learning rate rises, then falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    started, step, progress = time.monotonic(), 0, 0.0
    model.train()
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min(progress / WARM_UP, (1 - progress) ** 0.5)
        loss = model(**draw().arguments(), output_router_logits=True).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if tracker is not None:
            tracker.step()
        step += 1
        progress = (time.monotonic() - started) / seconds
        if step % 100 == 0:
            print(f"step {step:5}  {100 * progress:5.1f} % of the time  loss {loss.item():.3f}")
    model.eval()
    print(f"trained {step} steps of {BATCH} sequences")


def make_model(output: Path, seconds: float, training: list[Pair]) -> None:
    """Train and save: OUTPUT/pretrained, OUTPUT/model, and what the tracker saw between them."""
    texts = [*manual(), *docstrings()]
    tokenizer = train_tokenizer([*texts, *(text for pair in training for text in pair)])
    running = torch.tensor(
        [token for text in (*texts, *(p.source for p in training)) for token in
         tokenizer(text)["input_ids"]]
    )  # fmt: skip
    print(f"{len(running) / 1e6:.2f} M tokens of text, {len(training)} pairs")
    model = new_model()

    def text() -> Batch:
        starts = torch.randint(len(running) - SOURCE - TARGET, (BATCH, 1))
        windows = running[starts + torch.arange(SOURCE + TARGET)]
        return Batch(windows[:, :SOURCE], windows[:, SOURCE:])

    every = Batch.of(tokenizer, training)

    def pairs() -> Batch:
        rows = torch.randint(len(training), (BATCH,))
        return Batch(every.source[rows], every.target[rows])

    for name, draw in (("pretrained", text), ("model", pairs)):
        tracked = name == "model"
        tracker = moeq.RouterNormTracker(output / "routers.safetensors", model) if tracked else None
        train(model, draw, seconds, tracker)
        if tracker is not None:
            tracker.save()
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)


@torch.inference_mode()
def judge(folder: Path, pairs: list[Pair]) -> Scores:
    """Judge a checkpoint, packed or not, on pairs that it has not seen."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    loss, tokens, summaries = 0.0, 0, []
    for start in range(0, len(pairs), BATCH):
        batch = Batch.of(tokenizer, pairs[start : start + BATCH])
        count = int((batch.target != PAD).sum())
        loss += count * model(**batch.arguments()).loss.item()
        tokens += count
        answers = model.generate(
            batch.source, attention_mask=(batch.source != PAD).long(), max_new_tokens=TARGET,
            do_sample=False,
        )  # fmt: skip
        summaries += tokenizer.batch_decode(answers, skip_special_tokens=True)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Scores(size, loss / tokens, mean_rouge(summaries, [pair.target for pair in pairs]))


def mean_rouge(summaries: list[str], references: list[str]) -> Rouge:
    """Return the means over pairs of a summary and its reference; words are not stemmed."""
    names = [f"rouge{kind}" for kind in "12L"]
    scores = rouge_score(summaries, references, rouge_keys=tuple(names))
    return Rouge(*(float(scores[f"{name}_fmeasure"]) for name in names))


def reversed_plan(model: Path, base: Path, bits: float) -> BitPlan:
    """Return the plan that gives high widths to the experts that the paper's rule puts last."""
    opposite = moeq.plan(model, bits=HIGH + LOW - bits, calib="none", base_router=str(base))
    swap = {HIGH: LOW, LOW: HIGH}

    def swapped(widths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(swap[width] for width in widths)

    widths = {
        container: LayerBits(swapped(bits.w13), swapped(bits.w2))
        for container, bits in opposite.expert_bits.items()
    }
    return BitPlan(opposite.group_size, widths)


def quantized(output: Path, pairs: Path, draws: int) -> Iterator[tuple[str, Path]]:
    """Write packed checkpoints one after another; yield what each is, and its folder."""
    model, routers = output / "model", output / "routers.safetensors"
    text: dict[str, Any] = {"calib": str(pairs), "nsamples": 128, "seqlen": SOURCE + TARGET + 1}
    for width in (HIGH, LOW):
        folder = output / f"uniform-{width}"
        result = moeq.quantize(model, folder, bits=width, strategy="uniform", **text)
        yield f"{width}, uniform", result.path
    for bits in (2.5, 2.125):
        rule = {"strategy": "combined", "base_router": str(routers)}
        plans: dict[str, dict[str, Any]] = {
            "the paper's rule": rule,
            "the paper's rule, reversed": {"plan": reversed_plan(model, routers, bits)},
            **{f"random {seed}": {"strategy": f"random:{seed}"} for seed in range(draws)},
            "measured": {"strategy": "sensitivity"},
        }
        for number, (name, options) in enumerate(plans.items()):
            if "plan" not in options:
                options["bits"] = bits
            folder = output / f"{bits}-{number}"
            yield f"{bits:g}, {name}", moeq.quantize(model, folder, **options, **text).path


def row(name: str, scores: Scores, original: Scores) -> list[str]:
    """Return the line of a table."""
    return [
        name,
        f"{scores.bytes / 1e6:.2f}",
        f"{scores.loss:.4f}",
        f"{scores.loss - original.loss:+.4f}",
        *(f"{100 * score:.1f}" for score in scores.rouge),
    ]


def main() -> None:
    """Train, quantize, judge, and write the section if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument(
        "--seconds", type=float, default=90, help="each, of both trainings (default 90)"
    )
    parser.add_argument("--pairs", type=int, default=128, help="held out and judged (default 128)")
    parser.add_argument("--random", type=int, default=3, help="random plans (default 3)")
    parser.add_argument("--results", type=Path, help="results file that gets a section")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists already; give the name of a new folder")

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
    training, held_out = split_pairs()
    held_out = sorted(held_out)[:: max(1, len(held_out) // options.pairs)][: options.pairs]
    options.output.mkdir(parents=True)
    pairs = options.output / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(pair._asdict()) for pair in training))
    make_model(options.output, options.seconds, training)

    original = judge(options.output / "model", held_out)
    rows = [row("16 (as trained)", original, original)]
    print(*rows[0], sep="  ", flush=True)
    for name, folder in quantized(options.output, pairs, options.random):
        rows.append(row(name, judge(folder, held_out), original))
        print(*rows[-1], sep="  ", flush=True)
    figures = table(["bits, plan", "MB", "loss", "increase", "ROUGE-1", "ROUGE-2", "ROUGE-L"], rows)
    print(figures)
    if options.results is not None:
        write_section(
            options.results,
            "Quality of plans",
            "Switch Transformer, summaries",
            [
                f"A Switch Transformer of 3.4 M parameters, trained for 2 × {options.seconds:g} "
                "seconds to predict the first line of a function's docstring from its code. All "
                "experts rounded with GPTQ by 128 training pairs, packed, and run by transformers "
                f"on our kernels: loss in nats per token and ROUGE (F1, %) of greedy answers on "
                f"{len(held_out)} pairs of files that it has not seen. Increases below 0.001 say "
                "nothing of plans: there, experts hardly matter to the model.",
                figures,
            ],
            ("torch", "transformers", "vllm-moeq"),
        )


if __name__ == "__main__":
    main()
