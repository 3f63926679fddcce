"""The figure of the theory lab: three panels, readable without colour."""

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from plans import Costs

if TYPE_CHECKING:
    from rare_features import Learning

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


def write_figure(
    path: Path,
    learning: "Learning",
    rates: tuple[float, ...],
    stops: tuple[int, ...],
    by_background: dict[float, Costs],
) -> None:
    """Draw the figure.

    Args:
        path: An SVG file.
        learning: AUC by steps and Lambda by answer.
        rates: Probabilities of the rare patterns, as in ``learning``.
        stops: Steps, as in ``learning``.
        by_background: What plans cost, by background.
    """
    plt.rcParams.update({"svg.hashsalt": "moeq", "svg.fonttype": "none", "font.size": 10})
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    _draw_auc(axes[0], learning, rates, stops)
    _draw_change(axes[1], learning, rates)
    _draw_accuracy(axes[2], by_background)
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw_auc(
    panel: Axes, learning: "Learning", rates: tuple[float, ...], stops: tuple[int, ...]
) -> None:
    for index, (rate, (colour, marker)) in enumerate(zip(rates, _STYLES, strict=False)):
        auc = learning.auc[:, index]
        panel.plot(stops, auc.mean(1), color=colour, marker=marker, label=f"α = {rate:g}")
        low, high = auc.amin(1), auc.amax(1)
        panel.fill_between(stops, low, high, color=colour, alpha=0.12, linewidth=0)
    panel.axhline(0.5, color="grey", linewidth=1, linestyle="--")
    panel.set(xscale="log", xlabel="steps of training", ylabel="AUC, rare before frequent")
    panel.set_xticks(stops, [str(stop) for stop in stops])
    panel.minorticks_off()
    panel.set_title("Order by Λ: holds until the hinge ends")
    panel.legend(loc="lower left")


def _draw_change(panel: Axes, learning: "Learning", rates: tuple[float, ...]) -> None:
    for index, (rate, (colour, marker)) in enumerate(zip(rates, _STYLES, strict=False)):
        answer, change = learning.own_answer[:, index], learning.change[:, index]
        style = {"color": colour, "marker": marker, "s": 8, "alpha": 0.35, "linewidths": 0}
        style["rasterized"] = True  # thousands of points
        panel.scatter(answer.flatten(), change.flatten(), label=f"α = {rate:g}", **style)
    panel.set(xlabel="answer to its own pattern", ylabel="Λ of an expert")
    panel.set_title("Λ: how much was learned, at any α and time")
    for handle in panel.legend(loc="upper left", markerscale=2).legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _draw_accuracy(panel: Axes, by_background: dict[float, Costs]) -> None:
    ratio = [cost.variance_ratio.mean().item() for cost in by_background.values()]
    for plan, (colour, marker) in zip(_PLANS, reversed(_STYLES), strict=True):
        accuracy = [cost.rare[plan].mean().item() for cost in by_background.values()]
        panel.plot(ratio, accuracy, color=colour, marker=marker, label=plan)
    panel.set(
        xscale="log",
        xlabel="MaxVar of frequent over rare experts",
        ylabel="accuracy on rare sequences",
    )
    ticks = (1, 1.5, 2, 3, 5, 10, 15)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_title("Bits by Λ: pay off while MaxVar is alike")
    panel.legend(loc="lower right", title="most bits for")
