"""What a comparison found, as data and as Markdown."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from moeq.comparison.study import Findings, Point
from moeq.signals.table import SIGNALS

RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Row:
    """One strategy at one budget; all random plans together are one.

    Attributes:
        method: How experts are rounded.
        bits: Average width asked for.
        strategy: How widths were chosen.
        total_bytes: Of all tensors.
        divergence: From the original on held-out text, nats per token.
        loss: Increase of the loss, nats per token.
        perplexity: Of the quantized model; of random plans that of their mean loss.
        spread: Standard deviation of the divergence over random plans; None for one plan.
        share: Divergence over the mean of the random plans of the same method and budget; None
            where there are none.
    """

    method: str
    bits: float
    strategy: str
    total_bytes: int
    divergence: float
    loss: float
    perplexity: float
    spread: float | None
    share: float | None


def rows(points: list[Point]) -> list[Row]:
    """Return a row for each strategy, budget and method: budgets in order, the best first."""
    result = []
    for method, bits in dict.fromkeys((point.method, point.bits) for point in points):
        here = [point for point in points if (point.method, point.bits) == (method, bits)]
        groups: dict[str, list[Point]] = {}
        for point in here:
            name = RANDOM if point.strategy.startswith("random:") else point.strategy
            groups.setdefault(name, []).append(point)
        random = groups.get(RANDOM)
        usual = statistics.mean(map(_divergence, random)) if random else None
        ranked = [_row(name, group, usual) for name, group in groups.items()]
        result += sorted(ranked, key=lambda row: row.divergence)
    return result


def _row(name: str, points: list[Point], usual: float | None) -> Row:
    divergences = [_divergence(point) for point in points]
    mean = statistics.mean(divergences)
    totals = [point.evaluation.total for point in points]
    return Row(
        method=points[0].method,
        bits=points[0].bits,
        strategy=f"{name} ({len(points)} plans)" if name == RANDOM else name,
        total_bytes=points[0].total_bytes,
        divergence=mean,
        loss=statistics.mean(total.loss - total.original_loss for total in totals),
        perplexity=math.exp(statistics.mean(total.loss for total in totals)),
        spread=statistics.stdev(divergences) if len(points) > 1 else None,
        share=mean / usual if usual else None,
    )


def _divergence(point: Point) -> float:
    return point.evaluation.total.divergence


def as_json(findings: Findings) -> dict[str, Any]:
    """Return all findings for programs."""
    return {
        "plans": [
            {
                "method": point.method,
                "bits": point.bits,
                "strategy": point.strategy,
                "total_bytes": point.total_bytes,
                "total": asdict(point.evaluation.total),
                "texts": {name: asdict(s) for name, s in point.evaluation.texts.items()},
                "routing_shift": dict(point.evaluation.routing_shift),
                "plan": point.plan.to_dict(),
            }
            for point in findings.points
        ],
        "signals": findings.signals,
        "rank_correlation_with_sensitivity": findings.correlations,
    }


def verdicts(findings: Findings) -> Iterator[str]:
    """Say for each method and budget which strategy wins, and how the default rule does."""
    table = rows(findings.points)
    for method, bits in dict.fromkeys((row.method, row.bits) for row in table):
        here = [row for row in table if (row.method, row.bits) == (method, bits)]
        best, *others = here
        text = f"{method}, {bits:g} bits: **{best.strategy}** wins with a divergence of "
        text += f"{best.divergence:.5f}"
        if best.share is not None:
            text += f", {best.share:.0%} of that of random plans"
        elif others:
            text += f"; {others[-1].strategy} has {others[-1].divergence:.5f}"
        combined = next((row for row in here if row.strategy == "combined"), None)
        if combined is not None and combined.share is not None:
            word = "better" if combined.share < 1 else "NOT better"
            text += f". The rule by router norms (combined) is {word} than they are: "
            text += f"{combined.share:.0%}"
        yield text + "."


def as_markdown(findings: Findings) -> str:
    """Return verdicts and tables."""
    lines = [f"- {verdict}" for verdict in verdicts(findings)]
    lines += [
        "",
        "| method | bits | strategy | all tensors, MB | KL | of random | loss | perplexity |",
    ]
    lines.append("|---|---:|---|---:|---:|---:|---:|---:|")
    for row in rows(findings.points):
        spread = "" if row.spread is None else f" ± {row.spread:.5f}"
        share = "" if row.share is None else f"{row.share:.0%}"
        lines.append(
            f"| {row.method} | {row.bits:g} | {row.strategy} | {row.total_bytes / 1e6:.2f} | "
            f"{row.divergence:.5f}{spread} | {share} | {row.loss:+.5f} | "
            f"{row.perplexity:.3f} |"
        )
    lines += [
        "",
        "| signal | needs | cost | most bits to | source | rank correlation with sensitivity |",
    ]
    lines.append("|---|---|---|---|---|---:|")
    lines += [
        f"| {signal.name} | {signal.needs} | {signal.cost} | {signal.most_bits_to} values | "
        f"{signal.source} | {findings.correlations[signal.name]:+.2f} |"
        for signal in SIGNALS
    ]
    return "\n".join(lines) + "\n"
