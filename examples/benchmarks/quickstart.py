"""Measures how long the quickstart takes on a fresh clone, and keeps what it prints."""

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

from results import RESULTS, table, write_section

REPOSITORY = Path(__file__).resolve().parents[2]


def run_fresh(folder: Path) -> tuple[list[tuple[str, float]], list[str]]:
    """Clone the last commit into ``folder`` and run the quickstart there.

    Returns:
        (stage, seconds) in order, and the lines of the final summary.

    Raises:
        subprocess.CalledProcessError: The clone or the quickstart failed.
    """
    clone = folder / "vllm-moeq"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
    # As in a new shell: without the environment that runs this benchmark.
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    path = environment["PATH"].split(os.pathsep)
    environment["PATH"] = os.pathsep.join(p for p in path if not p.startswith(str(REPOSITORY)))
    process = subprocess.Popen(
        ["examples/quickstart.sh"], cwd=clone, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    stages: list[tuple[str, float]] = []
    lines: list[str] = []
    started = time.monotonic()
    for line in process.stdout:
        print(line, end="")
        lines.append(line.rstrip())
        if line.startswith(("setting up", "== ")):
            now = time.monotonic()
            if stages:
                stages[-1] = (stages[-1][0], now - started)
            name = "set-up" if line.startswith("setting up") else line.removeprefix("== ").strip()
            stages.append((name, 0.0))
            started = now
    if process.wait() != 0:
        raise subprocess.CalledProcessError(process.returncode, "examples/quickstart.sh")
    stages[-1] = (stages[-1][0], time.monotonic() - started)
    summary = lines[max(i for i, line in enumerate(lines) if not line) + 1 :]
    return stages, summary


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stages, summary = run_fresh(Path(folder))
    total = sum(seconds for _, seconds in stages)
    write_section(
        options.results,
        "quickstart",
        [
            f"`examples/quickstart.sh` took {total / 60:.1f} minutes on a fresh clone, set-up "
            "included (all downloads; its length depends on the network):",
            table(["stage", "seconds"], [[name, f"{seconds:.0f}"] for name, seconds in stages]),
            "It ended with:",
            "```\n" + "\n".join(summary) + "\n```",
        ],
        packages=("torch", "transformers", "vllm", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
