"""Writes a comparison: a page, a picture, Markdown and JSON."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from moeq.checkpoint.disk_errors import disk_errors
from moeq.comparison.figures import overview
from moeq.comparison.page import render
from moeq.comparison.study import Findings
from moeq.comparison.summary import as_json, as_markdown
from moeq.requests import CompareRequest
from moeq.units import public_name


def write_comparison(
    folder: Path,
    request: CompareRequest,
    findings: Findings,
    tokens: torch.Tensor,
    heldout: Mapping[str, torch.Tensor],
) -> None:
    """Write a comparison.

    Args:
        folder: Where to.
        request: What was compared.
        findings: What came out.
        tokens: int64 [n, L]: calibration text.
        heldout: Text to its tokens, int64 [n, L].

    Raises:
        MoeqError: It cannot be written, or the page needs a package that is missing.
    """
    model = public_name(request.model)
    title = f"Bit plans for {model}"
    judged = sum(part.numel() for part in heldout.values())
    notes = [
        f"Expert weights of {model} at lower widths, group size {request.group_size}; at each "
        "average all plans take the same bytes.",
        f"Calibrated on {tokens.shape[0]} x {tokens.shape[1]} tokens of "
        f"{public_name(request.calib)}, judged on {judged:,} tokens of "
        f"{public_name(request.text)}.",
    ]
    files = {
        "compare.html": render(findings, title, notes),
        "compare.svg": overview(findings),
        "compare.md": "\n\n".join([f"# {title}", *notes, as_markdown(findings)]),
        "compare.json": json.dumps(as_json(findings), indent=1) + "\n",
    }
    with disk_errors(f"cannot write {request.output}"):
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
