"""One self-contained HTML page: plots of a comparison, plans and signals."""

import html
from functools import partial
from typing import Any

from moeq.comparison import figures
from moeq.comparison.study import Findings
from moeq.comparison.summary import Row, rows, verdicts
from moeq.html import document, table
from moeq.signals.table import SIGNALS


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
    parts += [_paper(figures.svg(partial(_pareto, findings, ranked, method))) for method in methods]
    parts.append("<h2>Plans</h2><p>Average width of gate, up and down of every expert.</p>")
    height = figures.plans_height(findings)
    parts.append(_paper(figures.svg(lambda figure: figures.plans(figure, findings), height=height)))
    parts.append("<h2>Signals</h2>")
    parts.append(
        "<p>Dark: more bits. Each layer is scaled by ranks. In brackets: rank correlation with the "
        "measured sensitivity.</p>"
    )
    height = 2 * -(-len(SIGNALS) // 3)
    parts.append(
        _paper(figures.svg(lambda figure: figures.signals(figure, findings), height=height))
    )
    parts.append("<h2>All figures</h2>")
    parts.append(_table(ranked))
    return document(title, parts)


def _pareto(findings: Findings, ranked: list[Row], method: str, figure: Any) -> None:
    figures.pareto(figure.subplots(), findings, ranked, method)


def _paper(svg: str) -> str:
    """Put a drawing on white paper, in dark mode, too."""
    return f'<div class="paper">{svg}</div>'


def _bold(text: str) -> str:
    before, _, rest = html.escape(text).partition("**")
    name, _, after = rest.partition("**")
    return f"{before}<b>{name}</b>{after}"


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
