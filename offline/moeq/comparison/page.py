"""One self-contained HTML page: plots of a comparison, plans and signals."""

import html
import io
from collections.abc import Callable
from functools import partial
from typing import Any

from moeq.comparison.study import GLOBAL, Findings, Point
from moeq.comparison.summary import RANDOM, Row, rows, verdicts
from moeq.errors import MoeqError
from moeq.html import document, table
from moeq.signals.table import SIGNALS
from vllm_moeq.format import WIDTHS

# Distinguishable for people who are colour-blind (Okabe and Ito, 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX*"
_SHOWN = ("uniform", "combined", "router-norm reversed", "maxvar", "pmq", f"{GLOBAL}output-error",
          f"{GLOBAL}sensitivity")  # fmt: skip
"""Strategies that are drawn where they were tried; others only if colours are left."""


def render(findings: Findings, title: str, notes: list[str]) -> str:
    """Return the page.

    Args:
        findings: What to show.
        title: Heading.
        notes: Lines that say what was measured on what.

    Raises:
        MoeqError: matplotlib is not installed.
    """
    ranked = rows(findings.points)
    methods = list(dict.fromkeys(row.method for row in ranked))
    parts = [f"<p>{html.escape(note)}</p>" for note in notes]
    parts.append(
        "<ul>" + "".join(f"<li>{_bold(text)}</li>" for text in verdicts(findings)) + "</ul>"
    )
    parts.append("<h2>Size against divergence</h2>")
    parts.append("<p>Left and down is better. Grey: random plans, each a dot.</p>")
    parts += [_figure(partial(_pareto, findings, ranked, method)) for method in methods]
    parts.append("<h2>Plans</h2><p>Average width of gate, up and down of every expert.</p>")
    chosen = _points_to_show(findings)
    parts.append(_figure(lambda figure: _plans(figure, chosen), height=2.2 * -(-len(chosen) // 2)))
    parts.append("<h2>Signals</h2>")
    parts.append(
        "<p>Dark: more bits. Each layer is scaled by ranks. In brackets: rank correlation with the "
        "measured sensitivity.</p>"
    )
    parts.append(
        _figure(lambda figure: _signals(figure, findings), height=2 * -(-len(SIGNALS) // 3))
    )
    parts.append("<h2>All figures</h2>")
    parts.append(_table(ranked))
    return document(title, parts)


def _bold(text: str) -> str:
    before, _, rest = html.escape(text).partition("**")
    name, _, after = rest.partition("**")
    return f"{before}<b>{name}</b>{after}"


def _figure(draw: Callable[[Any], None], height: float = 5) -> str:
    """Return a drawing as SVG."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MoeqError("the page needs matplotlib: pip install 'vllm-moeq[report]'") from error
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "moeq"
    figure = Figure(figsize=(10, height), layout="constrained")
    draw(figure)
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    text = target.getvalue()
    # Drawn for white paper, in dark mode, too.
    return f'<div class="paper">{text[text.index("<svg") :]}</div>'


def _pareto(findings: Findings, ranked: list[Row], method: str, figure: Any) -> None:
    axes = figure.subplots()
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


def _plans(figure: Any, points: list[Point]) -> None:
    grid = figure.subplots(-(-len(points) // 2), 2, squeeze=False)
    for axes, point in zip(grid.flat, points, strict=False):
        values = [
            [(2 * first + second) / 3 for first, second in zip(bits.w13, bits.w2, strict=True)]
            for bits in point.plan.expert_bits.values()
        ]
        widths = [width for row in values for width in row]
        image = axes.imshow(
            values,
            aspect="auto",
            cmap="viridis",
            vmin=min(WIDTHS[0], *widths),
            vmax=max(4, *widths),
        )
        axes.set_title(f"{point.strategy}, {point.bits:g} bits", fontsize=10)
        axes.set_xlabel("expert", fontsize=9)
        axes.set_ylabel("MoE layer", fontsize=9)
        figure.colorbar(image, ax=axes)
    for axes in grid.flat[len(points) :]:
        axes.set_axis_off()


def _signals(figure: Any, findings: Findings) -> None:
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


def _table(rows: list[Row]) -> str:
    header = ["method", "bits", "strategy", "MB", "KL", "of random", "loss", "perplexity"]
    cells = []
    for row in rows:
        spread = "" if row.spread is None else f" ± {row.spread:.5f}"
        cells.append(
            [
                row.method, f"{row.bits:g}", row.strategy, f"{row.total_bytes / 1e6:.2f}",
                f"{row.divergence:.5f}{spread}", "" if row.share is None else f"{row.share:.0%}",
                f"{row.loss:+.5f}", f"{row.perplexity:.3f}",
            ]
        )  # fmt: skip
    # The first of each method and average.
    best = {(row.method, row.bits): number for number, row in reversed([*enumerate(rows)])}
    return table(header, cells, best.values(), text=3)
