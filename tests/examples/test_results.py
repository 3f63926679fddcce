"""RESULTS.md: a benchmark replaces its own section and leaves all others as they are."""

import re
import subprocess
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


def test_sections_of_another_file_are_taken_over(results: Any, tmp_path: Path) -> None:
    ours, other = tmp_path / "RESULTS.md", tmp_path / "other.md"
    for name in ("old", "kept"):
        results.write_section(ours, "Speed", name, [f"Figures of {name}."])
    kept = ours.read_text().partition("<!-- begin: kept -->")[2]
    for topic, name in (("Speed", "old"), ("Speed", "new"), ("Quality", "more")):
        results.write_section(other, topic, name, ["New figures.", f"Of {name}."])
    results.take_over(ours, other)
    text = ours.read_text()
    assert "Figures of old." not in text and text.count("New figures.") == 3
    assert text.partition("<!-- begin: kept -->")[2].startswith(kept.rstrip())
    headings = re.findall("^#+ .*$", text, re.M)
    assert headings == [
        "# Measured results", "# Speed", "## old", "## kept", "## new", "# Quality", "## more",
    ]  # fmt: skip
    ours.unlink()
    command = [sys.executable, str(BENCHMARKS / "results.py"), "--results", str(ours)]
    subprocess.run([*command, str(other)], check=True)
    assert ours.read_text() == other.read_text()
    missing = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True)
    assert missing.returncode == 2 and f"No such file or directory: '{tmp_path / 'no'}'" in (
        missing.stderr
    )
    other.write_text("nothing")
    with pytest.raises(ValueError, match=f"{other} has no section"):
        results.take_over(ours, other)


def test_the_command_leaves_out_where_results_went(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "RESULTS.md"
    monkeypatch.setattr(sys, "argv", ["run.py", "--results", str(path), "--runs", "3"])
    results.write_section(path, "Speed", "a", ["Figures."])
    assert "\npython run.py --runs 3\n" in path.read_text()
