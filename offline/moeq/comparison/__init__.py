"""``moeq compare``: which strategy wins on the user's own model, at equal bytes."""

from moeq.comparison.page import render
from moeq.comparison.study import STRATEGIES, Findings, Point, Study
from moeq.comparison.summary import as_json, as_markdown, rows, verdicts

__all__ = [
    "STRATEGIES",
    "Findings",
    "Point",
    "Study",
    "as_json",
    "as_markdown",
    "render",
    "rows",
    "verdicts",
]
