"""Measures whether rounding can be better than the product's GPTQ, at equal bytes.

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
from layerwise_rounding import Method, Rounded, Target, round_experts
from plan_quality import PlannedModel, Text, read_texts
from results import RESULTS, table, write_section
from rotation import write_rotated

from moeq.allocation import PlanOptions, make_plan
from moeq.checkpoint import resolve_model
from moeq.families import expert_widths
from moeq.rounding import QuantizedWeight, quantize_gptq, quantize_rtn
from moeq.rounding.gptq import Refinement
from moeq.rounding.grid import Grid
from moeq.text import calibration_sequences
from vllm_moeq.format import BitPlan

PLANS: dict[str, PlanOptions] = {
    "2": PlanOptions(2, None, "uniform"),
    "2.5": PlanOptions(2.5, (3, 2), "random:0"),
}
PAYS = 0.9
"""An idea pays if it leaves at most this share of GPTQ's increase."""
SCALE_RATE, ROUTER_RATE = 1e-2, 1e-3
GPTQ = "GPTQ, the product"


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
        """The product's rounding, where learning starts."""
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
        seeds: Draws of calibration text it is tried with; None: all.
        starts_from_gptq: Whether GPTQ's own time comes on top.
    """

    name: str
    run: Run
    seeds: int | None = 1
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
    weight: torch.Tensor, hessian: torch.Tensor, samples: int, bits: int, group_size: int
) -> QuantizedWeight:
    """Round without looking at the inputs."""
    return quantize_rtn(weight, bits, group_size)


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


def distilled(scale_rate: float, router_rate: float) -> Run:
    """Return what learns scales and routers, with these rates, from GPTQ's result."""

    def run(trial: Trial) -> Outcome:
        model, weights = trial.model, trial.gptq.weights
        model.apply(None)
        teacher = last_hidden(model, trial.tokens)
        scales = LearnedScales(model.layers, trial.plan, weights)
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
    """Return the product's GPTQ with another refinement."""
    quantize = partial(quantize_gptq, refinement=Refinement(**refinement))  # type: ignore[arg-type]
    return layerwise(quantize=quantize)


IDEAS = (
    Idea(GPTQ, lambda trial: Outcome(trial.gptq), None, True),
    Idea("round to nearest", layerwise(quantize=round_to_nearest)),
    Idea("GPTQ without refinement", gptq_with(rounds=0)),
    Idea("GPTQ, codes refined, scales not", gptq_with(scales=False)),
    Idea(
        "GPTQ, grid searched without importance",
        layerwise(grid_search(partial(unweighted_grid, Grid.searched))),
    ),
    Idea("GPTQ, grid over the full range", layerwise(grid_search(full_range_grid))),
    Idea("GPTQ, w2 fitted to the expert's output", layerwise(target=Target.EXPERT)),
    Idea("GPTQ, fitted to the original model", layerwise(target=Target.STREAM)),
    Idea("GPTQ in a rotated residual stream", rotated_gptq),
    Idea("routers fitted to the original's logits", layerwise(recalibrate_routers=True)),
    Idea("rounding learned from the nearest", learned(quantize=round_to_nearest)),
    Idea("rounding learned from GPTQ", learned()),
    Idea("routers distilled", distilled(0, ROUTER_RATE), 1, True),
    Idea("scales distilled", distilled(SCALE_RATE, 0), None, True),
    Idea("scales and routers distilled", distilled(SCALE_RATE, ROUTER_RATE), 1, True),
)


class Found(NamedTuple):
    """What an idea brought in one trial: increase of the loss, and CPU seconds."""

    increase: float
    cpu_seconds: float


def judged(model: PlannedModel, outcome: Outcome, plan: BitPlan, texts: list[Text]) -> float:
    """Return the held-out loss of a quantized model."""
    widths, weights = expert_widths(plan, model.layers), outcome.rounded.weights
    model.fill(lambda name: weights[name].dequantize(widths[name]))
    names = {layer.router: f"model.layers.{layer.index}.mlp.gate.weight" for layer in model.layers}
    parameters = dict(model.model.named_parameters())
    changed = {
        parameters[names[stored]]: router for stored, router in outcome.rounded.routers.items()
    }
    before = {parameter: parameter.detach().clone() for parameter in changed}
    with torch.no_grad():
        for parameter, router in changed.items():
            # As it would be stored.
            parameter.copy_(router.bfloat16().float())
        loss = model.losses(texts).mean
        for parameter, original in before.items():
            parameter.copy_(original)
    return loss


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
    model: PlannedModel, texts: list[Text], full: float, options: argparse.Namespace
) -> dict[str, dict[str, list[Found]]]:
    """Return what each idea brought, by plan and idea, one entry for each draw."""
    found: dict[str, dict[str, list[Found]]] = {plan: defaultdict(list) for plan in options.plans}
    for plan in options.plans:
        for seed, trial in enumerate(trials(model, plan, options)):
            for idea in options.ideas:
                if seed >= (idea.seeds or options.seeds):
                    continue
                if idea.starts_from_gptq:
                    trial.gptq  # noqa: B018  # its time is counted apart
                start = time.process_time()
                outcome = idea.run(trial)
                seconds = time.process_time() - start
                if idea.starts_from_gptq:
                    seconds += trial.cpu_seconds["gptq"]
                loss = judged(outcome.model or model, outcome, trial.plan, texts)
                found[plan][idea.name].append(Found(loss - full, seconds))
                print(
                    f"== {plan} bits, seed {seed}, {idea.name}: {loss - full:+.4f}, "
                    f"{seconds:.0f} s", flush=True,
                )  # fmt: skip
    return found


def increases(found: list[Found]) -> list[float]:
    """Return the increase of the loss in each trial."""
    return [trial.increase for trial in found]


def relative(found: dict[str, list[Found]], name: str) -> float:
    """Return an idea's increase over GPTQ's, both over the draws that the idea was tried with."""
    own = increases(found[name])
    return statistics.mean(own) / statistics.mean(increases(found[GPTQ])[: len(own)])


def cells(found: dict[str, list[Found]], name: str) -> list[str]:
    """Return an idea's cells for one plan: increase, relative to GPTQ, CPU seconds."""
    values = increases(found[name])
    if len(values) > 1:
        increase = f"{statistics.mean(values):+.4f} ± {statistics.stdev(values):.4f}"
    else:
        increase = f"{values[0]:+.4f} (one draw)"
    seconds = statistics.mean(trial.cpu_seconds for trial in found[name])
    return [increase, f"{relative(found, name):.2f}", f"{seconds:.0f}"]


def verdict(found: dict[str, dict[str, list[Found]]], ideas: list[Idea]) -> str:
    """Say which ideas leave clearly less than GPTQ at every plan."""
    ratios = {
        idea.name: [relative(by_idea, idea.name) for by_idea in found.values()]
        for idea in ideas
        if idea.name != GPTQ
    }
    paying = {name: values for name, values in ratios.items() if max(values) <= PAYS}
    listed = ", ".join(
        f"{name} ({' and '.join(f'{value:.2f}' for value in values)} of it)"
        for name, values in paying.items()
    )
    widths = " and ".join(found)
    return (
        f"At {widths} bits these leave at most {PAYS:g} of the increase that the product's GPTQ "
        f"leaves: {listed or 'none'}."
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
    options.ideas = [idea for idea in IDEAS if any(word in idea.name for word in options.only)]
    model = PlannedModel(resolve_model(options.model))
    texts = read_texts(options.text, model.reader.folder, options.max_tokens, 512, 8)
    model.check(texts[0])
    full = model.losses(texts).mean
    found = measure(model, texts, full, options)
    write_section(
        options.results,
        f"beyond GPTQ: {options.title or model.reader.folder.name}",
        [
            verdict(found, options.ideas),
            f"Increase of the held-out loss (nats per token over 16 bits, {full:.4f}), "
            f"{sum(text.tokens for text in texts):,} tokens, group size {options.group_size}; mean "
            f"and standard deviation over {options.seeds} draws of {options.nsamples} × "
            f"{options.seqlen} calibration tokens, which are also what is learned on. 2.5 bits: "
            "`random:0` of 3 and 2. The second column of each plan is relative to GPTQ on the same "
            "draws, the third CPU seconds on one thread, of a machine with other work. Learned "
            f"rounding: {options.learning_steps} steps a layer; distillation: "
            f"{options.distillation_steps} steps.",
            table(
                [
                    "idea",
                    *(
                        f"{plan} bits: {column}"
                        for plan in found
                        for column in ("increase", "/ GPTQ", "s")
                    ),
                ],
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
