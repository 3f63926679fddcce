"""Which strategy wins on the user's own model, at equal bytes."""

from moeq.comparison.files import write_comparison
from moeq.comparison.page import render
from moeq.comparison.study import STRATEGIES, Findings, Point, Study, check_strategies
from moeq.comparison.summary import as_json, as_markdown, rows, verdicts

__all__ = [
    "STRATEGIES",
    "Findings",
    "Point",
    "Study",
    "as_json",
    "as_markdown",
    "check_strategies",
    "render",
    "rows",
    "verdicts",
    "write_comparison",
]
