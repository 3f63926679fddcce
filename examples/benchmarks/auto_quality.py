"""Measures whether `--strategy auto` takes the right plan, over several draws of calibration text.

    python examples/benchmarks/auto_quality.py MODEL --calib TEXT --text HELDOUT

Every plan that auto tries is rounded as `moeq quantize` rounds it and judged on held-out text. For
Mixtral models small enough to hold in float32.
"""

import argparse
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from held_out import HeldOut, Judgement
from plan_quality import PlannedModel, read_texts
from results import RESULTS, table, write_section

from moeq.allocation import PlanOptions
from moeq.calibration.calibration import Calibration
from moeq.checkpoint.families import expert_widths
from moeq.checkpoint.reader import resolve_model
from moeq.model.text import calibration_sequences
from moeq.planning.planner import RANDOM_PLANS, Planner
from moeq.rounding import QuantizedWeight
from vllm_moeq.format import WIDTHS, BitPlan

AUTO, RANDOM, GOAL = "auto", "random", 0.4
"""At most this share of the increase of the mean random plan, at widths that mix."""
Found = dict[str, list[list[Judgement]]]
"""By strategy: of each draw the plans of that name."""


def rounded(
    model: PlannedModel, plan: BitPlan, tokens: torch.Tensor, held_out: HeldOut
) -> Judgement:
    """Round the experts as the product does, and judge them."""
    calibration = Calibration(model.reader, model.layers, plan, tokens)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "calibration"
        calibration.run(folder, resume=False, progress=False)
        stored, widths = calibration.stored(folder), expert_widths(plan, model.layers)
        model.fill(lambda name: QuantizedWeight(*stored(name).values()).dequantize(widths[name]))
    return held_out.judge(model)


def measure(
    model: PlannedModel, held_out: HeldOut, bits: float, options: argparse.Namespace
) -> tuple[Found, list[str]]:
    """Return how all plans did, and the strategy that auto took in each draw."""
    found: Found = defaultdict(list)
    taken = []
    asked = PlanOptions(bits, None, AUTO, options.group_size, base_router=options.base_router)
    for seed in range(options.seeds):
        tokens = calibration_sequences(
            model.reader.folder, options.calib, options.nsamples, options.seqlen, seed
        )
        planner = Planner(
            model.reader, model.layers, asked, options.model, tokens, "gptq", torch.device("cpu"),
            seed * RANDOM_PLANS,
        )  # fmt: skip
        plan, tried = planner.run(progress=False)
        taken.append(plan.provenance.strategy.removeprefix("auto: "))
        draw: dict[str, list[Judgement]] = defaultdict(list)
        for candidate in tried:
            name = candidate.plan.provenance.strategy
            if name == "combined" and bits in WIDTHS:
                continue  # all experts alike: the uniform plan
            judgement = rounded(model, candidate.plan, tokens, held_out)
            draw[RANDOM if name.startswith(RANDOM) else name].append(judgement)
            if candidate.plan.expert_bits == plan.expert_bits:
                draw[AUTO] = [judgement]
            print(f"== {bits:g} bits, draw {seed}, {name}: {judgement}", flush=True)
        for name, judgements in draw.items():
            found[name].append(judgements)
    return found, taken


def mean(draw: list[Judgement]) -> Judgement:
    """Return the mean of several plans."""
    return Judgement(*map(statistics.mean, zip(*draw, strict=True)))


def rows(found: Found) -> Iterator[list[str]]:
    """Yield the cells of each strategy, the best first."""
    usual = found.get(RANDOM)
    means = {name: mean([mean(draw) for draw in draws]) for name, draws in found.items()}
    for name in sorted(found, key=lambda name: means[name].divergence):
        plans = [judgement for draw in found[name] for judgement in draw]
        cells = [f"{name} ({len(plans)} plans)"]
        for values, average, sign, digits in zip(
            zip(*plans, strict=True), means[name], "+-", (4, 5), strict=True
        ):
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{average:{sign}.{digits}f}{spread}")
        if usual:
            cells.append(f"{means[name].divergence / means[RANDOM].divergence:.0%}")
        yield cells


def token_noise(judgement: Judgement, tokens: int) -> float:
    """Return about the standard error of a loss that comes from which tokens are judged.

    The logarithm of the ratio of two near probabilities varies by about twice the divergence.
    """
    return math.sqrt(2 * judgement.divergence / tokens)


def verdict(bits: float, found: Found, taken: list[str], tokens: int) -> str:
    """Say what auto took, and how that compares with the rest, judged on so many tokens."""
    auto = mean([mean(draw) for draw in found[AUTO]])
    others = {
        name: mean([mean(draw) for draw in draws])
        for name, draws in found.items()
        if name not in (AUTO, "sensitivity")
    }
    best = min(others, key=lambda name: others[name].divergence)
    text = (
        f"At {bits:g} bits auto took {', '.join(taken)}; its divergence is "
        f"{auto.divergence / others[best].divergence:.0%} of that of {best}, the best of the plans "
        "without measured sensitivity"
    )
    if RANDOM not in others:
        return text + "."
    usual = others[RANDOM]
    increases = [judgement.increase for draw in found[RANDOM] for judgement in draw]
    spread = statistics.stdev(increases) / math.sqrt(len(increases))
    noise = math.hypot(spread, token_noise(usual, tokens))
    if usual.increase < 2 * noise:
        return (
            f"{text}. Random plans raise the loss by {usual.increase:.4f} ± {noise:.4f} (standard "
            f"error, over plans and tokens), not beyond noise, and auto by {auto.increase:.4f}: "
            f"that cannot tell whether auto meets the goal of {GOAL:.0%}."
        )
    share = auto.increase / usual.increase
    word = "meets" if share <= GOAL else "MISSES"
    return (
        f"{text}, and its increase of the loss is {share:.0%} of that of the mean random plan, "
        f"which {word} the goal of {GOAL:.0%}."
    )


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--calib", required=True, help="calibration text, as in moeq quantize")
    parser.add_argument("--text", required=True, type=Path, help="held-out text file or folder")
    parser.add_argument("--base-router", metavar="SOURCE", help="as in moeq quantize")
    parser.add_argument("--title", help="default: name of the model")
    parser.add_argument("--bits", nargs="+", type=float, default=[2.5, 3], help="default 2.5 3")
    parser.add_argument("--nsamples", type=int, default=96, help="default 96")
    parser.add_argument("--seqlen", type=int, default=256, help="default 256")
    parser.add_argument("--seeds", type=int, default=3, help="draws of text (default 3)")
    parser.add_argument("--group-size", type=int, default=128, help="default 128")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    model = PlannedModel(resolve_model(options.model))
    texts = read_texts(options.text, model.reader.folder, options.max_tokens, 512, 8)
    model.check(texts[0])
    held_out = HeldOut(model, texts)
    parts = []
    for bits in options.bits:
        found, taken = measure(model, held_out, bits, options)
        noises = [
            token_noise(judgement, held_out.tokens)
            for draws in found.values()
            for draw in draws
            for judgement in draw
        ]
        header = ["strategy", "loss", "KL"] + ["KL, of random"] * (RANDOM in found)
        parts += [verdict(bits, found, taken, held_out.tokens), table(header, rows(found))]
        parts.append(
            "To the ± of a loss comes a standard error from which tokens are judged: about "
            f"{min(noises):.4f} for the plan nearest to the original, {max(noises):.4f} for the "
            "farthest."
        )
    write_section(
        options.results,
        f"auto: {options.title or model.reader.folder.name}",
        [
            f"Plans of equal bytes, group size {options.group_size}, over {options.seeds} draws of "
            f"{options.nsamples} × {options.seqlen} calibration tokens, of which a quarter is held "
            "back to choose a plan; rounded by all of them, as `moeq quantize` does; judged on "
            f"{held_out.tokens:,} held-out tokens. loss: increase, in nats per token, over "
            f"{held_out.loss:.4f}; KL: from the original; ±: standard deviation over plans.",
            *parts,
        ],
        packages=("torch", "transformers", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
