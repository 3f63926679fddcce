"""Drawings of a comparison, with matplotlib."""

import io
from collections.abc import Callable
from typing import Any

from moeq.comparison.study import GLOBAL, Findings, Point
from moeq.comparison.summary import RANDOM, Row, rows
from moeq.errors import MoeqError
from moeq.signals.table import SIGNALS
from vllm_moeq.format import WIDTHS

# Distinguishable for people who are colour-blind (Okabe and Ito, 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX*"
_SHOWN = ("uniform", "combined", "router-norm reversed", "maxvar", "pmq", f"{GLOBAL}output-error",
          f"{GLOBAL}sensitivity")  # fmt: skip
"""Strategies that are drawn where they were tried; others only if colours are left."""


def svg(draw: Callable[[Any], None], width: float = 10, height: float = 5) -> str:
    """Return a drawing as SVG, for white paper.

    Args:
        draw: Takes a figure of matplotlib.
        width: Inches.
        height: Inches.

    Raises:
        MoeqError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MoeqError("the page needs matplotlib: pip install 'vllm-moeq[report]'") from error
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "moeq"
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    text = target.getvalue()
    return text[text.index("<svg") :]


def overview(findings: Findings) -> str:
    """Return one small picture: sizes against divergence, and the plan of the best strategy."""
    ranked = rows(findings.points)
    method = ranked[0].method
    best = max(
        _points_to_show(findings), key=lambda point: point.strategy == f"{GLOBAL}sensitivity"
    )

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        pareto(left, findings, ranked, method)
        _plan(figure, right, best)

    return svg(draw, 10, 3.6)


def pareto(axes: Any, findings: Findings, ranked: list[Row], method: str) -> None:
    """Draw size against divergence of every plan that was rounded by a method."""
    random = [
        point for point in findings.points
        if point.method == method and point.strategy.startswith("random:")
    ]  # fmt: skip
    axes.scatter(
        [point.total_bytes / 1e6 for point in random],
        [point.evaluation.total.divergence for point in random],
        s=18, color="#aaa", label=RANDOM, zorder=2,
    )  # fmt: skip
    for number, strategy in enumerate(_shown(findings)):
        line = [row for row in ranked if (row.method, row.strategy) == (method, strategy)]
        line.sort(key=lambda row: row.total_bytes)
        axes.plot(
            [row.total_bytes / 1e6 for row in line],
            [row.divergence for row in line],
            marker=_MARKERS[number], color=_COLOURS[number], label=strategy, linewidth=1.2,
            linestyle="-" if len(line) > 1 else "none", markersize=6,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_title(f"rounded by {method}")
    axes.set_xlabel("all tensors, MB")
    axes.set_ylabel("KL from the original, nats per token")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)


def _shown(findings: Findings) -> list[str]:
    """Return the strategies to draw: of those that were tried as many as there are colours."""
    tried = [point.strategy for point in findings.points]
    first = [strategy for strategy in _SHOWN if strategy in tried]
    others = [s for s in tried if s not in _SHOWN and not s.startswith("random:")]
    return list(dict.fromkeys(first + others))[: len(_COLOURS)]


def _points_to_show(findings: Findings) -> list[Point]:
    """Return some plans of the first method, at the average that has most strategies."""
    method = findings.points[0].method
    here = [point for point in findings.points if point.method == method]
    counts = {point.bits: 0 for point in here}
    for point in here:
        counts[point.bits] += 1
    bits = max(counts, key=lambda value: counts[value])
    shown = _shown(findings)
    return [point for point in here if point.bits == bits and point.strategy in shown]


def plans(figure: Any, findings: Findings) -> None:
    """Draw the average widths of some plans."""
    points = _points_to_show(findings)
    grid = figure.subplots(-(-len(points) // 2), 2, squeeze=False)
    for axes, point in zip(grid.flat, points, strict=False):
        _plan(figure, axes, point)
    for axes in grid.flat[len(points) :]:
        axes.set_axis_off()


def plans_height(findings: Findings) -> float:
    """Return the inches that :func:`plans` needs."""
    return 2.2 * -(-len(_points_to_show(findings)) // 2)


def _plan(figure: Any, axes: Any, point: Point) -> None:
    values = [
        [(2 * first + second) / 3 for first, second in zip(bits.w13, bits.w2, strict=True)]
        for bits in point.plan.expert_bits.values()
    ]
    widths = [width for row in values for width in row]
    image = axes.imshow(
        values,
        aspect="auto",
        cmap="viridis_r",
        vmin=min(WIDTHS[0], *widths),
        vmax=max(4, *widths),
    )
    axes.set_title(f"bits: {point.strategy}, {point.bits:g} on average", fontsize=10)
    axes.set_xlabel("expert", fontsize=9)
    axes.set_ylabel("MoE layer", fontsize=9)
    figure.colorbar(image, ax=axes)


def signals(figure: Any, findings: Findings) -> None:
    """Draw the order of experts by each signal."""
    grid = figure.subplots(-(-len(SIGNALS) // 3), 3, squeeze=False)
    for axes, signal in zip(grid.flat, SIGNALS, strict=False):
        sign = 1 if signal.most_bits_to == "large" else -1
        values = [
            [sorted(layer, key=lambda v: sign * v).index(value) for value in layer]
            for layer in findings.signals[signal.name].values()
        ]
        axes.imshow(values, aspect="auto", cmap="Greys")
        axes.set_title(f"{signal.name} ({findings.correlations[signal.name]:+.2f})", fontsize=10)
        axes.set_xlabel("expert", fontsize=9)
        axes.set_ylabel("MoE layer", fontsize=9)
    for axes in grid.flat[len(SIGNALS) :]:
        axes.set_axis_off()
