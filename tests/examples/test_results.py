"""RESULTS.md: a benchmark replaces its own section and leaves all others as they are."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cli import ROOT

BENCHMARKS = ROOT / "examples" / "benchmarks"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import results

    yield results
    sys.modules.pop("results")


def test_sections_come_under_their_topics(results: Any, tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    for topic, name in (("Speed", "a"), ("Quality", "b"), ("Speed", "c"), ("Quality", "d")):
        results.write_section(path, topic, name, [f"Figures of {name}."])
    headings = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert headings == [
        "# Measured results",
        "# Speed",
        "## a",
        "## c",
        "# Quality",
        "## b",
        "## d",
    ]


def test_a_section_is_replaced_in_its_place_and_nothing_else_changes(
    results: Any, tmp_path: Path
) -> None:
    path = tmp_path / "RESULTS.md"
    before = (BENCHMARKS / "RESULTS.md").read_text()
    path.write_text(before)
    results.write_section(path, "Speed on a CPU", "packing", ["New figures."])
    after = path.read_text()
    begin, end = "<!-- begin: packing -->", "<!-- end: packing -->"
    assert "New figures." in after[after.index(begin) : after.index(end)]
    assert after[: after.index(begin)] == before[: before.index(begin)]
    assert after[after.index(end) :] == before[before.index(end) :]
