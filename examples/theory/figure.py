"""The figure of the theory lab: three panels, readable without colour."""

import math
from pathlib import Path

import matplotlib
from learning import RATES, STOPS, Learning
from plans import Costs

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#000000", "D"),
    ("#CC79A7", "v"),
    ("#E69F00", "P"),
)
_PLANS = ("16 bits", "small Λ", "large Λ", "random, balanced", "maxvar", "uniform")


def write_figure(path: Path, learning: Learning, by_background: dict[float, Costs]) -> None:
    """Draw the figure.

    Args:
        path: An SVG file.
        learning: AUC by steps and Lambda by answer.
        by_background: What plans cost, by background.
    """
    plt.rcParams.update({"svg.hashsalt": "moeq", "font.size": 10})
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    _draw_auc(axes[0], learning)
    _draw_change(axes[1], learning)
    _draw_accuracy(axes[2], by_background)
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw_auc(panel: Axes, learning: Learning) -> None:
    for index, (rate, (colour, marker)) in enumerate(zip(RATES, _STYLES, strict=False)):
        auc = learning.auc[:, index]
        error = auc.std(1) / math.sqrt(auc.shape[1])
        panel.errorbar(
            STOPS, auc.mean(1), error, color=colour, marker=marker, capsize=3, label=f"α = {rate:g}"
        )
    panel.axhline(0.5, color="grey", linewidth=1, linestyle="--")
    panel.set(xscale="log", ylim=(0.3, 1.05), xlabel="steps of training")
    panel.set_ylabel("AUC: a rare expert has the smaller Λ")
    panel.set_xticks(STOPS, [str(stop) for stop in STOPS])
    panel.minorticks_off()
    panel.set_title("Order by Λ: holds until the hinge ends")
    panel.legend(loc="center left")


def _draw_change(panel: Axes, learning: Learning) -> None:
    for index, (rate, (colour, marker)) in enumerate(zip(RATES, _STYLES, strict=False)):
        answer, change = learning.own_answer[:, index], learning.change[:, index]
        panel.scatter(
            answer.flatten(), change.flatten(), label=f"α = {rate:g}", color=colour, marker=marker,
            s=8, alpha=0.35, linewidths=0,
            rasterized=True,  # thousands of points
        )  # fmt: skip
    panel.set(xlabel="answer to its own pattern", ylabel="Λ of an expert")
    panel.set_title("Λ: how much was learned, at any α and time")
    for handle in panel.legend(loc="upper left", markerscale=2).legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _draw_accuracy(panel: Axes, by_background: dict[float, Costs]) -> None:
    places = range(len(by_background))
    for plan, (colour, marker) in zip(_PLANS, reversed(_STYLES), strict=True):
        accuracy = [cost.rare[plan].mean().item() for cost in by_background.values()]
        panel.plot(places, accuracy, color=colour, marker=marker, label=plan)
    labels = [
        f"{background:g}\n({cost.variance_ratio.mean():.1f})"
        for background, cost in by_background.items()
    ]
    panel.set_xticks(places, labels)
    panel.set(
        xlabel="background (MaxVar of frequent over rare experts)",
        ylabel="accuracy on rare sequences",
    )
    panel.set_title("Bits by Λ: only while MaxVar is alike")
    panel.legend(loc="lower left")
