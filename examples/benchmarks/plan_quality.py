"""Measures what bit plans of equal bytes cost in held-out perplexity.

For models small enough to hold in float32: no checkpoint is written, the chosen dequantized
weights are copied into the model that transformers loaded.
"""

import argparse
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from results import RESULTS, table, write_section
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeq.allocation import (
    PlanOptions,
    PlanSizes,
    make_plan,
    ordered_bits,
    plan_sizes,
    router_norm_order,
)
from moeq.checkpoint.families import MoELayer, expert_widths
from moeq.checkpoint.reader import CheckpointReader, resolve_model
from moeq.errors import MoeqError
from moeq.rounding import quantize_rtn
from moeq.signals import load_base_routers, router_norms
from vllm_moeq.format import BitPlan

UNIFORM = (4, 3, 2)
BITS, LEVELS = 2.5, (3, 2)
STRATEGIES = ("router-norm", "maxvar", "combined")
REVERSED = "router-norm reversed"
FINER_GROUP = 32


@dataclass(frozen=True, slots=True)
class Text:
    """One held-out text: windows of tokens in batches [batch, window]."""

    name: str
    batches: list[torch.Tensor]

    @property
    def tokens(self) -> int:
        """Number of tokens that are predicted: all but the first of each window."""
        return sum(len(batch) * (batch.shape[1] - 1) for batch in self.batches)


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean negative log-likelihood per token of each text, and over all tokens."""

    per_text: list[float]
    mean: float


@dataclass(frozen=True, slots=True)
class Result:
    """One plan with its sizes and what it costs."""

    plan: BitPlan
    sizes: PlanSizes
    losses: Losses

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token."""
        return self.losses.mean


Results = dict[str, Result]


class PlannedModel:
    """A model whose expert weights can be exchanged for those that a plan would store."""

    def __init__(self, folder: Path) -> None:
        self.reader = CheckpointReader(folder)
        self.layers = self.source.layers
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        parameters = dict(self.model.named_parameters())
        self._fused = {
            (int(match[1]), match[2]): parameter
            for name, parameter in parameters.items()
            if (match := re.search(r"layers\.(\d+)\..*experts\.(gate_up_proj|down_proj)$", name))
        }
        self._dequantized: dict[tuple[str, int, int], torch.Tensor] = {}

    def apply(self, plan: BitPlan | None) -> None:
        """Give every expert the weights that ``plan`` stores; None restores the original ones."""
        if plan is None:
            self.fill(self.reader.tensor)
        else:
            widths, group_size = expert_widths(plan, self.layers), plan.group_size
            self.fill(lambda name: self._weight(name, widths[name], group_size))

    @torch.inference_mode()
    def fill(self, weight: Callable[[str], torch.Tensor]) -> None:
        """Give every expert the weights that a function returns by their names on disk."""
        for layer in self.layers:
            gate_up = self._fused[layer.index, "gate_up_proj"]
            targets = {
                "gate": gate_up[:, : layer.intermediate_size],
                "up": gate_up[:, layer.intermediate_size :],
                "down": self._fused[layer.index, "down_proj"],
            }
            for expert, matrix, _ in layer.weights():
                targets[matrix][expert].copy_(weight(layer.tensor_name(expert, matrix)))

    def _weight(self, name: str, bits: int, group_size: int) -> torch.Tensor:
        key = (name, bits, group_size)
        if key not in self._dequantized:
            quantized = quantize_rtn(self.reader.tensor(name), bits, group_size)
            self._dequantized[key] = quantized.dequantize(bits)
        return self._dequantized[key]

    @torch.inference_mode()
    def check(self, text: Text) -> None:
        """Check that weights are copied to where transformers put them.

        Raises:
            MoeqError: The original weights, copied by :meth:`apply`, change the logits.
        """
        window = text.batches[0][:1]
        untouched = self.model(window).logits
        for parameter in self._fused.values():
            parameter.zero_()
        self.apply(None)
        if not torch.equal(untouched, self.model(window).logits):
            raise MoeqError("transformers arranges the experts of this model in another way")

    @torch.inference_mode()
    def losses(self, texts: list[Text]) -> Losses:
        """Evaluate the model as it is now."""
        sums = []
        for text in texts:
            total = 0.0
            for batch in text.batches:
                logits = self.model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
                total += cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
            sums.append(total)
        return Losses(
            [total / text.tokens for total, text in zip(sums, texts, strict=True)],
            sum(sums) / sum(text.tokens for text in texts),
        )


def read_texts(
    source: Path, folder: Path, max_tokens: int, window: int, batch_size: int
) -> list[Text]:
    """Cut each text file into windows that do not overlap; the last one may be shorter."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for path in sorted(source.glob("*.txt")) if source.is_dir() else [source]:
        text = path.read_text(encoding="utf-8")
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = torch.tensor(encoded[:max_tokens])
        full = len(tokens) // window * window
        batches = list(tokens[:full].view(-1, window).split(batch_size)) if full else []
        if len(tokens) - full > 1:
            batches.append(tokens[full:].unsqueeze(0))
        texts.append(Text(path.stem, batches))
    return texts


def plans(
    reader: CheckpointReader, layers: list[MoELayer], options: argparse.Namespace
) -> Iterator[tuple[str, BitPlan]]:
    """Yield the plans to compare, by name."""

    def plan(strategy: str, bits: float, group_size: int = options.group_size) -> BitPlan:
        base = options.base_router if strategy in ("router-norm", "combined") else None
        levels = None if strategy == "uniform" else LEVELS
        wanted = PlanOptions(bits, levels, strategy, group_size, base)
        return make_plan(reader, layers, wanted, options.model)

    for bits in UNIFORM:
        yield f"uniform {bits}", plan("uniform", bits)
    if options.group_size != FINER_GROUP:
        yield f"uniform 2, groups of {FINER_GROUP}", plan("uniform", 2, FINER_GROUP)
    for strategy in STRATEGIES:
        yield strategy, plan(strategy, BITS)
    yield REVERSED, reversed_router_norm(reader, layers, options)
    for seed in range(options.seeds):
        yield f"random:{seed}", plan(f"random:{seed}", BITS)


def reversed_router_norm(
    reader: CheckpointReader, layers: list[MoELayer], options: argparse.Namespace
) -> BitPlan:
    """Return the plan opposite to router-norm: most bits to the largest norm change."""
    base = load_base_routers(options.base_router, layers) if options.base_router else None
    expert_bits = {}
    for layer in layers:
        order = router_norm_order(router_norms(reader, layer, base).values)[::-1]
        expert_bits[layer.container] = ordered_bits(order, BITS, LEVELS)
    return BitPlan(options.group_size, expert_bits)


def summary_table(full: Losses, expert_bytes: int, results: Results, seeds: int) -> str:
    """Return the table of all plans; the random ones once each and together."""
    mean, deviation = random_spread(results)

    def row(name: str, bits: float, size: float, loss: float, versus: str = "") -> list[str]:
        return [
            name, f"{bits:.3f}", f"{size:,.0f}", f"{loss:.4f}", f"{loss - full.mean:+.4f}",
            f"{math.exp(loss):.3f}", versus,
        ]  # fmt: skip

    weights = results["uniform 2"].sizes.expert_weights
    rows = [row("16 bits", expert_bytes * 8 / weights, expert_bytes, full.mean)]
    for name, result in results.items():
        sizes, versus = result.sizes, ""
        if name in (*STRATEGIES, REVERSED):
            versus = f"{(result.loss - mean) / deviation:+.1f}"
        rows.append(row(name, sizes.bits_per_weight, sizes.expert_bytes, result.loss, versus))
    sizes = results["random:0"].sizes
    rows.append(
        row(f"mean of {seeds} random", sizes.bits_per_weight, sizes.expert_bytes, mean, "0")
    )
    rows[-1][3] += f" ± {deviation:.4f}"
    header = [
        "plan", "bits per weight, all in", "expert bytes", "NLL", "increase", "perplexity",
        "random std from random mean",
    ]  # fmt: skip
    return table(header, rows)


def text_table(full: Losses, texts: list[Text], results: Results) -> str:
    """Return the increase of each text's loss for each plan, with the mean of random plans."""
    rows = [
        ["tokens", *(f"{text.tokens:,}" for text in texts)],
        ["16 bits (NLL)", *(f"{loss:.3f}" for loss in full.per_text)],
    ]
    increases = {
        name: [
            loss - base for loss, base in zip(result.losses.per_text, full.per_text, strict=True)
        ]
        for name, result in results.items()
    }
    random = [values for name, values in increases.items() if name.startswith("random:")]
    shown = {name: values for name, values in increases.items() if not name.startswith("random:")}
    shown["random, mean"] = [statistics.mean(values) for values in zip(*random, strict=True)]
    shown["random, std"] = [statistics.stdev(values) for values in zip(*random, strict=True)]
    for name, values in shown.items():
        sign = "" if name == "random, std" else "+"
        rows.append([name, *(f"{value:{sign}.3f}" for value in values)])
    return table(["NLL increase", *(text.name for text in texts)], rows)


def random_spread(results: Results) -> tuple[float, float]:
    """Return mean and standard deviation of the random plans' losses."""
    losses = random_losses(results)
    return statistics.mean(losses), statistics.stdev(losses)


def random_losses(results: Results) -> list[float]:
    """Return the random plans' losses."""
    return [result.loss for name, result in results.items() if name.startswith("random:")]


def verdicts(results: Results) -> str:
    """Say of each strategy whether it beats random plans, and the best whether uniform ones."""
    random = random_losses(results)
    mean, deviation = random_spread(results)
    lines = []
    for name in (*STRATEGIES, REVERSED):
        loss = results[name].loss
        distance = (loss - mean) / deviation
        if abs(distance) < 2:
            verdict = "does not differ clearly from"
        else:
            verdict = "wins against" if distance < 0 else "LOSES to"
        beaten = sum(loss < other for other in random)
        lines.append(
            f"- **{name}** {verdict} the random mean: {distance:+.1f} random standard deviations "
            f"({loss - mean:+.4f} in NLL); better than {beaten} of {len(random)} random plans."
        )
    change = results["router-norm"].loss - results[REVERSED].loss
    lines.append(
        f"- Most bits to SMALL norm changes, as the method wants, is {abs(change):.4f} in NLL "
        f"{'WORSE' if change > 0 else 'better'} than the opposite order ({change / deviation:+.1f} "
        "random standard deviations)."
    )
    if results["combined"].plan.expert_bits == results["router-norm"].plan.expert_bits:
        lines.append("- combined is the same plan as router-norm here: no expert overtakes.")
    best = min(STRATEGIES, key=lambda name: results[name].loss)
    finer = f"uniform 2, groups of {FINER_GROUP}"
    if finer in results:
        change = results[finer].loss - results[best].loss
        lines.append(
            f"- Without mixed widths, **{finer}** at {results[finer].sizes.bits_per_weight:.3f} "
            f"instead of {results[best].sizes.bits_per_weight:.3f} bits per weight is "
            f"{'better' if change < 0 else 'worse'} than the best strategy, {best} "
            f"({change:+.4f} in NLL)."
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument("--text", type=Path, required=True, help="held-out file, or folder of .txt")
    parser.add_argument("--base-router", metavar="SOURCE", help="as for `moeq plan`")
    parser.add_argument("--group-size", type=int, default=128, help="weights per scale")
    parser.add_argument("--seeds", type=int, default=5, help="random plans, at least 2 (default 5)")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each text (default 8192)")
    parser.add_argument("--window", type=int, default=512, help="context in tokens (default 512)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows at once (default 4)")
    parser.add_argument("--title", help="name of the section (default: the model's)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2, for a standard deviation")

    folder = resolve_model(options.model)
    texts = read_texts(options.text, folder, options.max_tokens, options.window, options.batch_size)
    model = PlannedModel(folder)
    model.check(texts[0])
    full = model.losses(texts)
    results: Results = {}
    for name, plan in (bar := tqdm(list(plans(model.reader, model.layers, options)))):
        bar.set_description(name)
        model.apply(plan)
        sizes = plan_sizes(plan, model.reader, model.layers)
        results[name] = Result(plan, sizes, model.losses(texts))

    expert_bytes = sum(
        model.reader.info(layer.tensor_name(expert, matrix)).num_bytes
        for layer in model.layers
        for expert, matrix, _ in layer.weights()
    )
    signal = "true norm change" if options.base_router else "surrogate: final norm"
    write_section(
        options.results,
        f"plan quality: {options.title or Path(options.model).name}",
        [
            f"Which experts should get the higher width? At {BITS} bits from levels "
            f"{', '.join(map(str, LEVELS))}, so at equal bytes, with round to nearest and the "
            f"router norm from the {signal}:",
            verdicts(results),
            f"Held-out loss over {sum(text.tokens for text in texts):,} tokens in windows of "
            f"{options.window}, model in float32; group size {options.group_size} unless named. "
            "NLL is the mean negative log-likelihood per token, the increase is over 16 bits. The "
            "last column is the distance from the random mean in standard deviations of the random "
            "plans; below 2 either way counts as no clear difference.",
            summary_table(full, expert_bytes, results, options.seeds),
            "The same increase for each text:",
            text_table(full, texts, results),
        ],
        packages=("torch", "transformers", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
