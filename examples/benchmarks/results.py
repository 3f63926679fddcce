"""Writes the sections of RESULTS.md: every benchmark replaces its own and leaves the others.

``python examples/benchmarks/results.py FILE...`` takes over the sections of other results files,
such as a GPU machine returns.
"""

import argparse
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vllm_moeq._version import __version__

RESULTS = Path("examples/benchmarks/RESULTS.md")
_PREAMBLE = """# Measured results

Every section is written by the command that it names; no figure is edited by hand.
"""


def write_section(
    path: Path,
    topic: str,
    name: str,
    parts: Iterable[str],
    packages: Sequence[str] = ("torch", "vllm-moeq"),
) -> None:
    """Replace section ``name`` of a results file, or add it to its topic; make both if need be.

    Args:
        path: The results file.
        topic: Heading above the section.
        name: Heading of the section, which also identifies it.
        parts: Markdown paragraphs: first what the figures show, then tables and notes.
        packages: Packages whose versions matter; one that is missing is said to be.
    """
    _replace(path, topic, name, "\n\n".join((f"## {name}", *parts, _origin(packages))))


def take_over(path: Path, source: Path) -> None:
    """Replace sections of a results file by those of another one, or add them.

    Raises:
        ValueError: The other file has no section; names it.
    """
    topic, found = "", False
    for heading, name, section in re.findall(
        r"^# ([^\n]+)$|^<!-- begin: ([^\n]+) -->\n\n(.*?)\n\n<!-- end: \2 -->$",
        source.read_text(encoding="utf-8"),
        re.M | re.S,
    ):
        if heading:
            topic = heading
        else:
            found = True
            _replace(path, topic, name, section)
    if not found:
        raise ValueError(f"{source} has no section of a results file")


def _replace(path: Path, topic: str, name: str, content: str) -> None:
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    section = f"{begin}\n\n{content}\n\n{end}"
    text = path.read_text(encoding="utf-8") if path.exists() else _PREAMBLE
    before, found, rest = text.partition(begin)
    text = before + section + rest.partition(end)[2] if found else _added(text, topic, section)
    path.write_text(text, encoding="utf-8")
    print(f"wrote section {name!r} of {path}")


def _added(text: str, topic: str, section: str) -> str:
    """Return a file with a section more, at the end of its topic."""
    heading = f"\n# {topic}\n"
    if heading not in text:
        text = f"{text.rstrip()}\n{heading}"
    place = text.find("\n# ", text.index(heading) + len(heading))
    place = len(text) if place < 0 else place
    return f"{text[:place].rstrip()}\n\n{section}\n{text[place:]}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose other columns are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _origin(packages: Sequence[str]) -> str:
    """Say when, where and how the figures were measured."""
    versions = ", ".join(f"{package} {_version(package)}" for package in packages)
    return (
        f"Measured {date.today()} on {_hardware()}; Python {platform.python_version()}, {versions}."
        f"\n\n```\n{_command()}\n```"
    )


def _version(package: str) -> str:
    if package == "vllm-moeq":  # a clone may not be installed
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _hardware() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = model[1] if model else platform.machine()
    cores = f"{processor}, {torch.get_num_threads()} of {os.cpu_count()} cores used"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} and {cores}"
    return cores


def _command() -> str:
    """Return the command line, with paths relative to the current folder.

    Without the results file: figures do not depend on it, and it may be anywhere.
    """
    words = [os.path.relpath(word) if os.path.isabs(word) else word for word in sys.argv]
    if "--results" in words:
        place = words.index("--results")
        del words[place : place + 2]
    return shlex.join(["python", *words])


def main() -> None:
    """Take over other files; exit with status 2 if one cannot be read or has no section."""
    parser = argparse.ArgumentParser(description="Takes over sections of other results files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    for file in options.files:
        try:
            take_over(options.results, file)
        except (OSError, ValueError) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
