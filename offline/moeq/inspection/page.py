"""One self-contained page about a packed checkpoint."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from moeq.calibration import REPORT_NAME
from moeq.checkpoint.atomic import write_new_file
from moeq.checkpoint.wording import linear_summary, size_of_tried
from moeq.errors import MoeqError
from moeq.html import document, table
from moeq.inspection.inspection import Inspection
from moeq.planning import MEASUREMENT_NAME
from vllm_moeq.format import PROJECTIONS, WIDTHS, LayerBits

# From light to dark for people who are colour-blind, too (viridis).
_COLOURS = {1: "#fde725", 2: "#7ad151", 3: "#22a884", 4: "#2a788e", 8: "#414487"}
_LAYER = re.compile(r".*\blayers\.(\d+)\.")
_STYLE = """
.map { border-spacing: 2px; border-collapse: separate; }
.map td { padding: 0; border: 0; width: 1.1em; min-width: .7em; height: 1.5em; border-radius: 2px; }
.map th { border: 0; font-weight: 400; padding: 0 .5em 0 0; white-space: nowrap; }
.map td:is(:hover, :focus) { outline: 2px solid var(--text); }
.map td:is(:hover, :focus)::after { content: attr(aria-label); white-space: pre-wrap;
            text-align: left; position: fixed; left: 0; right: 0; bottom: 0; padding: .6em 1em;
            background: var(--back); border-top: 1px solid var(--line); pointer-events: none; }
.key span { display: inline-block; width: 1em; height: 1em; border-radius: 2px;
            vertical-align: -.15em; margin: 0 .3em 0 1em; }
.bar { display: inline-block; height: .8em; border-radius: 2px; background: #2a788e; }
"""


def render(inspection: Inspection) -> str:
    """Return the page: sizes, the plan as a map, widths, coverage, and errors by layer."""
    body = [
        *_sizes(inspection),
        *_plan_map(inspection),
        *_tried(inspection),
        *_widths(inspection),
        *_linear(inspection),
        *_coverage(inspection),
        *_errors(inspection),
    ]
    return document(f"{inspection.name}: bits of every expert", body, _STYLE)


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page.

    Raises:
        MoeqError: The file exists or cannot be written, or a report is damaged.
    """
    try:
        text = render(inspection)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise MoeqError(
            f"{inspection.name}: {REPORT_NAME} or {MEASUREMENT_NAME} is damaged ({error!r}): copy "
            "the checkpoint again"
        ) from error
    write_new_file(path, text, "html")


def _sizes(inspection: Inspection) -> Iterator[str]:
    provenance = inspection.plan.provenance
    rows = [
        ("strategy", provenance.strategy),
        ("bits asked for / achieved", f"{_number(provenance.requested_bits)} / "
         f"{_number(provenance.achieved_bits)}"),
        ("bits per expert weight, with scales", _number(provenance.bits_per_weight)),
        ("group size", str(inspection.plan.group_size)),
        ("packed experts", _megabytes(provenance.expert_bytes)),
        ("dense layers", linear_summary(inspection.plan)),
        ("all tensors", _megabytes(provenance.total_bytes)),
        ("rounding", str(provenance.details.get("rounding", "unknown"))),
        ("moeq", provenance.moeq_version),
    ]  # fmt: skip
    yield table([], rows, text=2)


def _plan_map(inspection: Inspection) -> Iterator[str]:
    yield "<h2>Plan</h2>"
    key = "".join(
        f'<span style="background:{colour}"></span>{bits} bit' for bits, colour in _COLOURS.items()
    )
    yield (
        "<p>A row for each MoE layer, a cell for each expert: its upper half is the width of gate "
        "and up, its lower half that of down. Point at a cell, tap it or go there with Tab to see "
        "what is known of the expert."
        f'</p><p class="key">{key}</p>'
    )
    rows = []
    for container, bits in inspection.plan.expert_bits.items():
        cells = "".join(
            f'<td tabindex="0" aria-label="{escape(_about(inspection, container, bits, expert))}" '
            f'style="background:linear-gradient({_COLOURS[bits.w13[expert]]} 50%,'
            f'{_COLOURS[bits.w2[expert]]} 50%)"></td>'
            for expert in range(bits.num_experts)
        )
        rows.append(f"<tr><th>{escape(_layer(container))}</th>{cells}</tr>")
    yield '<div class="wide"><table class="map">' + "\n".join(rows) + "</table></div>"


def _about(inspection: Inspection, container: str, bits: LayerBits, expert: int) -> str:
    """Return what is known of an expert, in lines."""
    lines = [f"expert {expert}: w13 {bits.w13[expert]} bit, w2 {bits.w2[expert]} bit"]
    if container in inspection.router_norms:
        lines.append(f"router norm {inspection.router_norms[container][expert]:.4g}")
    if inspection.calibration is not None:
        tokens = inspection.calibration["experts"][container]["tokens"][expert]
        lines.append(f"{tokens:,} calibration tokens")
    if inspection.measurement is not None:
        measured = inspection.measurement["experts"][container]
        lines.append(
            f"gets {measured['frequency'][expert]:.1%} of the tokens, mean router weight "
            f"{measured['router_weight'][expert]:.3f}"
        )
        for projection in PROJECTIONS:
            errors = measured["errors"][projection]
            lines.append(
                f"{projection}: divergence {errors['loss'][expert]:.2e} nats, output error "
                f"{errors['output'][expert]:.3g}, weight error {errors['weight'][expert]:.3g}"
            )
    return "\n".join(lines)


def _tried(inspection: Inspection) -> Iterator[str]:
    tried: Sequence[Mapping[str, Any]] = inspection.plan.provenance.details.get("tried", [])
    if not tried:
        return
    yield "<h2>Plans that were tried</h2>"
    yield (
        f"<p>On {tried[0]['tokens']:,} tokens held back from the calibration text, at equal "
        "bytes but for a step of one expert, in nats per token.</p>"
    )
    size = size_of_tried(tried)
    rows = [
        [
            plan["strategy"],
            f"{plan[size]:,}",
            f"{plan['divergence']:.5f}",
            f"{plan['loss_increase']:+.5f}",
        ]
        for plan in tried
    ]
    yield table(["plan", size.replace("_", " "), "divergence (KL)", "loss"], rows, best=[0])


def _widths(inspection: Inspection) -> Iterator[str]:
    yield "<h2>Widths</h2>"
    layers = inspection.plan.expert_bits
    used = [
        width for width in WIDTHS if any(width in (*bits.w13, *bits.w2) for bits in layers.values())
    ]
    rows = []
    for container, bits in layers.items():
        counts = [Counter(getattr(bits, projection)) for projection in PROJECTIONS]
        rows.append([_layer(container), *(f"{counts[0][w]} / {counts[1][w]}" for w in used)])
    header = ["experts, w13 / w2", *(f"{width} bit" for width in used)]
    yield table(header, rows)


def _linear(inspection: Inspection) -> Iterator[str]:
    widths: dict[str, dict[str, int]] = {}
    for name, bits in inspection.plan.linear_bits.items():
        match = _LAYER.match(name)
        layer, inside = ("", name) if match is None else (match[1], name[match.end() :])
        widths.setdefault(layer, {})[inside] = bits
    if not widths:
        return
    names = list(dict.fromkeys(name for layer in widths.values() for name in layer))
    yield "<h2>Dense layers</h2>"
    yield "<p>Bits of each; those that are not named here have 16.</p>"
    rows = [
        [f"layer {layer}", *(str(bits_of.get(name, "")) for name in names)]
        for layer, bits_of in sorted(widths.items(), key=lambda item: int(item[0] or -1))
    ]
    yield table(["layer", *names], rows)


def _coverage(inspection: Inspection) -> Iterator[str]:
    if inspection.calibration is None:
        return
    report = inspection.calibration
    yield "<h2>Calibration</h2>"
    yield (
        f"<p>Of {report['tokens']:,} tokens, what the router gives to the experts. Experts with "
        f"fewer than {report['fewest_tokens']} are rounded without them"
        f"{', but here all got all tokens' if report['route_all_experts'] else ''}.</p>"
    )
    rows = []
    for container, coverage in report["experts"].items():
        tokens = coverage["tokens"]
        few = sum(count < report["fewest_tokens"] for count in tokens)
        rows.append(
            [
                _layer(container), f"{min(tokens):,}", f"{median(tokens):,.0f}",
                f"{max(tokens):,}", str(few),
            ]
        )  # fmt: skip
    yield table(["tokens of an expert", "fewest", "median", "most", "too few"], rows)


def _errors(inspection: Inspection) -> Iterator[str]:
    if inspection.measurement is None:
        return
    yield "<h2>Errors by layer</h2>"
    yield (
        "<p>Estimated divergence from the original, in nats per token, of all experts of a layer "
        "at their widths: measured one projection at a time, the rest being original.</p>"
    )
    sums = {
        container: [sum(measured["errors"][projection]["loss"]) for projection in PROJECTIONS]
        for container, measured in inspection.measurement["experts"].items()
    }
    largest = max(sum(values) for values in sums.values()) or 1.0
    lines = [
        f"<tr><td>{escape(_layer(container))}</td><td>{values[0]:.2e}</td><td>{values[1]:.2e}</td>"
        f'<td class="text"><span class="bar" style="width:{12 * sum(values) / largest:.2f}em">'
        "</span></td></tr>"
        for container, values in sums.items()
    ]
    yield (
        '<div class="wide"><table><tr><th class="text">layer</th><th>w13</th><th>w2</th><th></th>'
        "</tr>" + "\n".join(lines) + "</table></div>"
    )


def _layer(container: str) -> str:
    number = re.search(r"\.(\d+)\.", container)
    return f"layer {number[1]}" if number else container


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _megabytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 1e6:,.2f} MB"
