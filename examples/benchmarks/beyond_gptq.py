"""Measures what the product adds to GPTQ, and what else could be added, at equal bytes.

    python examples/benchmarks/beyond_gptq.py MODEL --calib TEXT --text HELDOUT

For Mixtral models small enough to train in float32. Everything is judged by held-out loss; what is
learned is learned on the calibration text that GPTQ gets.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from distillation import LearnedScales, distill, last_hidden
from held_out import HeldOut, Judgement
from layerwise_rounding import Method, Rounded, Target, round_experts
from plan_quality import PlannedModel, read_texts
from results import RESULTS, table, write_section
from rotation import write_rotated

from moeq.allocation import PlanOptions, make_plan
from moeq.checkpoint.families import expert_widths
from moeq.checkpoint.reader import resolve_model
from moeq.model.text import calibration_sequences
from moeq.rounding import Hessian, QuantizedWeight, quantize_gptq, quantize_rtn
from moeq.rounding.gptq import Refinement
from moeq.rounding.grid import Grid
from vllm_moeq.format import BitPlan

PLANS: dict[str, PlanOptions] = {
    "2": PlanOptions(2, None, "uniform"),
    "2.5": PlanOptions(2.5, (3, 2), "random:0"),
}
PAYS = 0.9
"""An idea pays if it leaves at most this share of GPTQ's increase."""
SCALE_RATE, ROUTER_RATE = 1e-2, 1e-3
GPTQ = "GPTQ alone"
COLUMNS = ("increase", "share", "divergence", "share", "s")


@dataclass
class Trial:
    """One model, plan and draw of calibration text, with what the ideas share.

    Attributes:
        model: Its weights are overwritten by every idea.
        work: Empty folder.
        learning_steps: Of learned rounding, for each layer.
        distillation_steps: Of end-to-end distillation.
        cpu_seconds: Of the shared parts that are done.
    """

    model: PlannedModel
    plan: BitPlan
    tokens: torch.Tensor
    work: Path
    learning_steps: int
    distillation_steps: int
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def gptq(self) -> Rounded:
        """Plain GPTQ, where learning starts."""
        start = time.process_time()
        rounded = self.rounded()
        self.cpu_seconds["gptq"] = time.process_time() - start
        return rounded

    def rounded(self, **method: object) -> Rounded:
        """Round layer by layer."""
        model = self.model
        return round_experts(model.reader, model.layers, self.plan, self.tokens, Method(**method))  # type: ignore[arg-type]


class Outcome(NamedTuple):
    """A quantized model: what is rounded, and the model to put it in if it is not the trial's."""

    rounded: Rounded
    model: PlannedModel | None = None


Run = Callable[[Trial], Outcome]


class Idea(NamedTuple):
    """Something to compare.

    Attributes:
        name: For the table.
        run: Does it.
        serious: Whether it is tried with every plan and draw of calibration text, not just once.
        starts_from_gptq: Whether GPTQ's own time comes on top.
    """

    name: str
    run: Run
    serious: bool = False
    starts_from_gptq: bool = False


def layerwise(
    context: Callable[[], AbstractContextManager[object]] | None = None, **method: object
) -> Run:
    """Return what rounds with a :class:`Method`."""

    def run(trial: Trial) -> Outcome:
        with context() if context else nullcontext():
            return Outcome(trial.rounded(**method))

    return run


def round_to_nearest(
    weights: torch.Tensor, curvature: Hessian, bits: int, group_size: int
) -> list[QuantizedWeight]:
    """Round without looking at the inputs."""
    return [quantize_rtn(weight, bits, group_size) for weight in weights]


def rotated_gptq(trial: Trial) -> Outcome:
    """Rotate the residual stream, then round with GPTQ."""
    folder = trial.work / "rotated"
    write_rotated(trial.model.reader.folder, folder, seed=0)
    model = PlannedModel(folder)
    rounded = round_experts(model.reader, model.layers, trial.plan, trial.tokens, Method())
    return Outcome(rounded, model)


def learned(**method: object) -> Run:
    """Return what learns codes and ranges after a :class:`Method`."""

    def run(trial: Trial) -> Outcome:
        return Outcome(trial.rounded(learning_steps=trial.learning_steps, **method))

    return run


def distilled(scale_rate: float, router_rate: float, target: Target = Target.MATRIX) -> Run:
    """Return what learns scales and routers, with these rates, after GPTQ with a target."""

    def run(trial: Trial) -> Outcome:
        model = trial.model
        start = trial.gptq if target is Target.MATRIX else trial.rounded(target=target)
        model.apply(None)
        teacher = last_hidden(model, trial.tokens)
        scales = LearnedScales(model.layers, trial.plan, start.weights)
        on_disk = {f"layers.{layer.index}.mlp.gate.weight": layer.router for layer in model.layers}
        routers = {name: model.reader.tensor(stored).float() for name, stored in on_disk.items()}
        steps = trial.distillation_steps
        distill(model, trial.tokens, teacher, scales, routers, (scale_rate, router_rate), steps)
        learned = {on_disk[name]: router.detach() for name, router in routers.items()}
        return Outcome(Rounded(scales.stored(), learned))

    return run


def grid_search(search: Callable[..., Grid]) -> Callable[[], AbstractContextManager[object]]:
    """Return what replaces the search of a group's grid for a while."""
    return lambda: mock.patch.object(Grid, "searched", search)


def unweighted_grid(
    searched: Callable[..., Grid], groups: torch.Tensor, bits: int, _: torch.Tensor | None = None
) -> Grid:
    """Search a grid that takes every column for equally important."""
    return searched(groups, bits)


def full_range_grid(
    groups: torch.Tensor, bits: int, importance: torch.Tensor | None = None
) -> Grid:
    """Lay a grid from a group's smallest to its largest weight."""
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    return Grid.between(groups, low, high, bits, importance)


def gptq_with(**refinement: object) -> Run:
    """Return GPTQ with another refinement."""
    quantize = partial(quantize_gptq, refinement=Refinement(**refinement))  # type: ignore[arg-type]
    return layerwise(quantize=quantize)


IDEAS = (
    Idea(GPTQ, lambda trial: Outcome(trial.gptq), True, True),
    Idea("w2 fitted to the expert's output", layerwise(target=Target.EXPERT), True),
    Idea("every matrix fitted to the original model", layerwise(target=Target.STREAM), True),
    Idea(
        "the product: w2 fitted to the original's residual stream",
        layerwise(target=Target.RESIDUAL),
        True,
    ),
    Idea("scales distilled", distilled(SCALE_RATE, 0), True, True),
    Idea(
        "the product, then scales distilled",
        distilled(SCALE_RATE, 0, Target.RESIDUAL),
    ),
    Idea("GPTQ in a rotated residual stream", rotated_gptq),
    Idea("round to nearest", layerwise(quantize=round_to_nearest)),
    Idea("GPTQ without refinement", gptq_with(rounds=0)),
    Idea("GPTQ, codes refined, scales not", gptq_with(scales=False)),
    Idea(
        "GPTQ, grid searched without importance",
        layerwise(grid_search(partial(unweighted_grid, Grid.searched))),
    ),
    Idea("GPTQ, grid over the full range", layerwise(grid_search(full_range_grid))),
    Idea("routers fitted to the original's logits", layerwise(recalibrate_routers=True)),
    Idea("rounding learned from the nearest", learned(quantize=round_to_nearest)),
    Idea("rounding learned from GPTQ", learned()),
    Idea("routers distilled", distilled(0, ROUTER_RATE), False, True),
    Idea("scales and routers distilled", distilled(SCALE_RATE, ROUTER_RATE), False, True),
)


class Found(NamedTuple):
    """What an idea brought in one trial."""

    judgement: Judgement
    cpu_seconds: float


def judged(held_out: HeldOut, model: PlannedModel, rounded: Rounded, plan: BitPlan) -> Judgement:
    """Judge a quantized model; its routers are put back afterwards."""
    widths, weights = expert_widths(plan, model.layers), rounded.weights
    model.fill(lambda name: weights[name].dequantize(widths[name]))
    parameters = dict(model.model.named_parameters())
    changed = {
        parameters[f"model.layers.{layer.index}.mlp.gate.weight"]: rounded.routers[layer.router]
        for layer in model.layers
        if layer.router in rounded.routers
    }
    before = {parameter: parameter.detach().clone() for parameter in changed}
    with torch.no_grad():
        for parameter, router in changed.items():
            parameter.copy_(router.bfloat16())  # as it would be stored
        judgement = held_out.judge(model)
        for parameter, original in before.items():
            parameter.copy_(original)
    return judgement


def trials(model: PlannedModel, name: str, options: argparse.Namespace) -> Iterator[Trial]:
    """Yield a trial for each draw of the calibration text."""
    wanted = PLANS[name]
    wanted = PlanOptions(wanted.bits, wanted.levels, wanted.strategy, options.group_size)
    plan = make_plan(model.reader, model.layers, wanted, options.model)
    for seed in range(options.seeds):
        tokens = calibration_sequences(
            model.reader.folder, options.calib, options.nsamples, options.seqlen, seed
        )
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            yield Trial(
                model, plan, tokens, Path(work), options.learning_steps, options.distillation_steps
            )


def measure(
    model: PlannedModel, held_out: HeldOut, options: argparse.Namespace
) -> dict[str, dict[str, list[Found]]]:
    """Return what each idea brought, by plan and idea, one entry for each draw."""
    found: dict[str, dict[str, list[Found]]] = {plan: defaultdict(list) for plan in options.plans}
    for plan in options.plans:
        for seed, trial in enumerate(trials(model, plan, options)):
            for idea in options.ideas:
                if not idea.serious and (plan != options.plans[0] or seed > 0):
                    continue
                if idea.starts_from_gptq:
                    trial.gptq  # noqa: B018  # its time is counted apart
                start = time.process_time()
                outcome = idea.run(trial)
                seconds = time.process_time() - start
                if idea.starts_from_gptq:
                    seconds += trial.cpu_seconds["gptq"]
                judgement = judged(held_out, outcome.model or model, outcome.rounded, trial.plan)
                found[plan][idea.name].append(Found(judgement, seconds))
                print(
                    f"== {plan} bits, seed {seed}, {idea.name}: {judgement.increase:+.4f}, "
                    f"divergence {judgement.divergence:.5f}, {seconds:.0f} s", flush=True,
                )  # fmt: skip
    return found


def relative(found: dict[str, list[Found]], name: str) -> list[float]:
    """Return an idea's increase and divergence, each as a share of GPTQ's on the same draws."""
    own = [trial.judgement for trial in found[name]]
    gptq = [trial.judgement for trial in found[GPTQ][: len(own)]]
    return [sum(mine) / sum(its) for mine, its in zip(zip(*own), zip(*gptq), strict=True)]  # noqa: B905


def cells(found: dict[str, list[Found]], name: str) -> list[str]:
    """Return an idea's cells for one plan; empty ones if it was not tried."""
    if not found[name]:
        return [""] * len(COLUMNS)
    texts = []
    for values, sign, digits in zip(zip(*(trial.judgement for trial in found[name])), "+-", (4, 5)):  # noqa: B905
        text = f"{statistics.mean(values):{sign}.{digits}f}"
        if len(values) > 1:
            text += f" ± {statistics.stdev(values):.{digits}f}"
        texts.append(text)
    (increase, divergence), shares = texts, relative(found, name)
    seconds = statistics.mean(trial.cpu_seconds for trial in found[name])
    return [
        increase, f"{shares[0]:.2f}", divergence, f"{shares[1]:.2f}", f"{seconds:.0f}",
    ]  # fmt: skip


def verdict(found: dict[str, dict[str, list[Found]]], ideas: list[Idea]) -> str:
    """Say which ideas leave clearly less than GPTQ at every plan."""
    ratios = {
        idea.name: [share for by_idea in found.values() for share in relative(by_idea, idea.name)]
        for idea in ideas
        if idea.serious and idea.name != GPTQ
    }
    paying = [
        f"{name} ({', '.join(f'{value:.2f}' for value in values)} of it)"
        for name, values in ratios.items()
        if max(values) <= PAYS
    ]
    return (
        f"At {' and '.join(found)} bits these leave at most {PAYS:g} of both the increase and the "
        f"divergence that GPTQ alone leaves: {'; '.join(paying) or 'none'}."
    )


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--calib", required=True, help="calibration text, as in moeq quantize")
    parser.add_argument("--text", required=True, type=Path, help="held-out text file or folder")
    parser.add_argument("--title", help="default: name of the model")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), help="bits")
    parser.add_argument("--nsamples", type=int, default=96, help="default 96")
    parser.add_argument("--seqlen", type=int, default=256, help="default 256")
    parser.add_argument("--seeds", type=int, default=3, help="of calibration (default 3)")
    parser.add_argument("--learning-steps", type=int, default=100, help="a layer (default 100)")
    parser.add_argument("--distillation-steps", type=int, default=100, help="default 100")
    parser.add_argument("--group-size", type=int, default=128, help="default 128")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--work", type=Path, help="folder for checkpoints on the way")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    parser.add_argument("--only", nargs="+", default=[""], help="ideas whose name holds a word")
    options = parser.parse_args()
    options.ideas = [
        idea
        for idea in IDEAS
        if idea.name == GPTQ or any(word in idea.name for word in options.only)
    ]
    model = PlannedModel(resolve_model(options.model))
    texts = read_texts(options.text, model.reader.folder, options.max_tokens, 512, 8)
    model.check(texts[0])
    held_out = HeldOut(model, texts)
    found = measure(model, held_out, options)
    several = ""
    if options.seeds > 1:
        several = f", those with ± mean and standard deviation over {options.seeds} draws"
    write_section(
        options.results,
        f"beyond GPTQ: {options.title or model.reader.folder.name}",
        [
            verdict(found, options.ideas),
            f"Increase of the held-out loss (nats per token over 16 bits, {held_out.loss:.4f}) and "
            f"divergence of the next-token distribution from the original's, {held_out.tokens:,} "
            f"tokens, group size {options.group_size}; 2.5 bits: `random:0` of 3 and 2; "
            f"{options.nsamples} × {options.seqlen} calibration tokens. Figures are of ONE draw of "
            f"them{several}. Shares are of GPTQ on the same draws. Seconds are CPU time of one "
            "thread. "
            f"Learned rounding: {options.learning_steps} steps a layer; distillation: "
            f"{options.distillation_steps} steps; both learn on the same calibration tokens.",
            table(
                ["idea", *(f"{plan} bits: {column}" for plan in found for column in COLUMNS)],
                [
                    [
                        idea.name,
                        *(cell for by_idea in found.values() for cell in cells(by_idea, idea.name)),
                    ]
                    for idea in options.ideas
                ],
            ),
        ],
        packages=("torch", "transformers", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
