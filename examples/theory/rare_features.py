"""Measures when experts of rare patterns have the smaller router norm change, and what it is worth.

    python examples/theory/rare_features.py

Writes the measured section of examples/theory/README.md and the figure beside it.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from figure import write_figure
from learning import RATES, STOPS, Learning, measure_learning, rank_correlation
from plans import ROUNDINGS, Costs, Trained
from setting import Setting, margins, rare_first_auc

# results.py lies with the benchmarks.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from results import table, write_section

FOLDER = Path("examples/theory")
BACKGROUNDS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
PLANS = ("uniform", "small Λ", "large Λ", "combined", "maxvar", "random, balanced", "random")


@dataclass(frozen=True, slots=True)
class Regime:
    """One way to train and to quantize.

    Attributes:
        name: What differs from the default.
        setting: Sizes and learning rates.
        rate: Probability of the rare patterns.
        stop: Steps of training.
        levels: The two widths; half of the experts get the higher one.
        rounding: One of ``ROUNDINGS``.
        background: Standard deviation of weights on directions that carry no pattern.
    """

    name: str
    setting: Setting = Setting()
    rate: float = 0.05
    stop: int = 50
    levels: tuple[int, int] = (3, 1)
    rounding: str = "`quantize_rtn`"
    background: float = 0.4

    def train(self, runs: int, seed: int) -> Trained:
        """Train models for it."""
        return Trained(self.setting, self.rate, self.stop, runs, seed)

    def costs(self, models: Trained, background: float) -> Costs:
        """Measure what the plans cost them."""
        return models.costs(background, self.levels, ROUNDINGS[self.rounding])


DEFAULT = Regime("default")
REGIMES = (
    DEFAULT,
    Regime("25 steps", stop=25),
    Regime("100 steps", stop=100),
    Regime("400 steps", stop=400),
    Regime("α = 0.1", rate=0.1),
    Regime("α = 0.2", rate=0.2),
    Regime(
        "α = 0.2, 400 steps: all saturated (background 3.2)", rate=0.2, stop=400, background=3.2
    ),
    Regime("α = 0.5: no rare pattern", rate=0.5),
    Regime("2 and 1 bits", levels=(2, 1)),
    Regime("3 and 2 bits", levels=(3, 2)),
    Regime("4 and 2 bits", levels=(4, 2)),
    Regime("4 neurons", Setting(neurons=4, expert_rate=0.4)),
    Regime("64 neurons", Setting(neurons=64, expert_rate=6.4)),
    Regime("16 experts", Setting(per_task=4)),
    Regime("8 more experts that prefer nothing", Setting(idle=8)),
    Regime("experts choose 4 tokens", Setting(capacity=4)),
    Regime("experts choose 1 token: router without gradient", Setting(capacity=1)),
    Regime("16 patterns", Setting(patterns=16)),
    Regime("64 patterns", Setting(patterns=64)),
    Regime("initial weights 0.1", Setting(weight_std=0.1)),
    Regime("symmetric grids", rounding="symmetric, no zero point"),
    Regime("symmetric grids, 4 and 2 bits", rounding="symmetric, no zero point", levels=(4, 2)),
    Regime("one grid for all experts", rounding="one grid for all experts"),
    Regime("one grid, 4 and 2 bits", rounding="one grid for all experts", levels=(4, 2)),
)


def learning_parts(learning: Learning) -> list[str]:
    """Return the Markdown of the first claim."""
    header = ["α", *(f"{stop} steps" for stop in STOPS)]
    auc_rows, margin_rows = [], []
    for index, rate in enumerate(RATES):
        auc = learning.auc[:, index]
        auc_rows.append([f"{rate:g}", *(f"{row.mean():.2f} ({row.min():.2f})" for row in auc)])
        both = zip(learning.rare_margin[:, index], learning.frequent_margin[:, index], strict=True)
        cells = (f"{rare.mean():.2f} / {frequent.mean():.2f}" for rare, frequent in both)
        margin_rows.append([f"{rate:g}", *cells])
    pooled = rank_correlation(learning.change, learning.own_answer)
    return [
        "### Which experts have the smaller Λ",
        "How surely an expert of a rare pattern has a smaller Λ than one of a frequent pattern "
        f"(AUC; 0.5 is chance): mean and, in brackets, the least of {learning.auc.shape[2]} runs.",
        table(header, auc_rows),
        "Mean margin (label times output) of rare / frequent sequences. At 1 the hinge ends and an "
        "expert stops learning.",
        table(header, margin_rows),
        "Over all experts, runs, steps and α together, the rank correlation between Λ and what an "
        f"expert answers to its own pattern is {pooled:.3f}.",
        "![When the order by Λ holds, what Λ measures, and what it is worth](rare_features.svg)",
    ]


def plan_parts(by_background: dict[float, Costs]) -> list[str]:
    """Return the Markdown of the second claim at the default regime."""
    rows = []
    for background, cost in by_background.items():
        changes = [f"{mean:+.3f} ± {std:.3f}" for mean, std in cost.margin_change.values()]
        accuracy = [f"{cost.rare[plan].mean():.3f}" for plan in PLANS]
        leads = [lead(cost, plan).text() for plan in ("large Λ", "uniform")]
        ratio = f"{cost.variance_ratio.mean():.2f}"
        rows.append([f"{background:g}", ratio, *changes, *accuracy, *leads])
    lowest = min(
        cost.frequent[plan].mean().item() for cost in by_background.values() for plan in PLANS
    )
    high, low = DEFAULT.levels
    runs = len(cost.variance_ratio)
    return [
        "### What bits by Λ are worth",
        f"Accuracy on rare sequences with {high} bits for half of the experts and {low} for the "
        f"others, rounded by `quantize_rtn`; α = {DEFAULT.rate}, {DEFAULT.stop} steps, {runs} "
        f"runs. At 16 bits it is {cost.rare['16 bits'].mean():.3f}. Leads are mean differences "
        "within a run, with their standard error. Margin change: of rare sequences, if only these "
        f"experts are rounded, to {low} bit (mean ± standard deviation). Accuracy on frequent "
        f"sequences is at least {lowest:.3f} everywhere in this table.",
        table(
            [
                "background",
                "MaxVar, frequent / rare",
                *(f"margin change, {kind}" for kind in cost.margin_change),
                *PLANS,
                "lead over large Λ",
                "lead over uniform",
            ],
            rows,
        ),
    ]


class Lead(NamedTuple):
    """Mean and standard error of a difference in accuracy."""

    mean: float
    error: float

    def text(self) -> str:
        """Return it as text."""
        return f"{self.mean:+.3f} ± {self.error:.3f}"

    def verdict(self) -> int:
        """Return 1, -1 or 0: a lead, the opposite, or less than two standard errors."""
        return (self.mean > 2 * self.error) - (self.mean < -2 * self.error)


def lead(cost: Costs, plan: str) -> Lead:
    """Return how much better most bits for small Lambda are than another plan."""
    difference = cost.rare["small Λ"] - cost.rare[plan]
    return Lead(difference.mean().item(), difference.std().item() / math.sqrt(len(difference)))


def regime_parts(runs: int, seed: int) -> list[str]:
    """Measure all regimes; return the Markdown."""
    rivals = ("large Λ", "random, balanced")
    columns = ["MaxVar ratio", "small Λ", *(f"− {rival}" for rival in rivals)]
    rows = []
    verdicts: dict[tuple[str, str], list[int]] = {}
    for regime in REGIMES:
        models = regime.train(runs, seed)
        auc = rare_first_auc(models.change, models.setting).mean()
        margin = margins(models.weights, models.test, models.setting)[models.test.rare].mean()
        row = [regime.name, f"{auc:.2f}", f"{margin:.2f}"]
        for name, background in (("without", 0.0), ("with", regime.background)):
            cost = regime.costs(models, background)
            row += [f"{cost.variance_ratio.mean():.1f}", f"{cost.rare['small Λ'].mean():.3f}"]
            for rival in rivals:
                row.append(lead(cost, rival).text())
                if regime.rounding == DEFAULT.rounding:
                    verdicts.setdefault((name, rival), []).append(lead(cost, rival).verdict())
        rows.append(row)
        print(*row, sep=" | ", flush=True)
    counts = "; ".join(
        f"{name} a background, against {rival}: {found.count(1)} better, {found.count(-1)} worse, "
        f"{found.count(0)} undecided"
        for (name, rival), found in verdicts.items()
    )
    return [
        "### Other regimes",
        "Accuracy on rare sequences with most bits for small Λ, and its lead over the opposite "
        "and over random plans that give both classes the same bits. Without a background, then "
        f"(b) with one of {DEFAULT.background}. Leads of more than two standard errors with "
        f"`quantize_rtn`, counted over the regimes: {counts}.",
        table(["regime", "AUC", "rare margin", *columns, *(f"{c} (b)" for c in columns)], rows),
    ]


def main() -> None:
    """Measure, and write the section and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="for each α (default 20)")
    parser.add_argument("--plan-runs", type=int, default=100, help="for each regime (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    options = parser.parse_args()
    torch.set_num_threads(1)

    learning = measure_learning(options.runs, Setting(), options.seed)
    print("learning measured", flush=True)
    models = DEFAULT.train(options.plan_runs, options.seed)
    by_background = {background: DEFAULT.costs(models, background) for background in BACKGROUNDS}
    regimes = regime_parts(options.plan_runs, options.seed)

    figure = options.folder / "rare_features.svg"
    write_figure(figure, learning, by_background)
    write_section(
        options.folder / "README.md",
        "The theory lab: when does the router norm say which expert needs bits?",
        "Measured",
        [*learning_parts(learning), *plan_parts(by_background), *regimes],
        packages=("torch", "matplotlib", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
