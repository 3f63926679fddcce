"""Compares what `moeq quantize --dry-run` tells of time and memory with what the command takes.

    python examples/benchmarks/quantize_cost.py MODEL --calib TEXT

Both run in turns, each in a process of its own. All options but those below are the defaults.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
import torch
from results import RESULTS, table, write_section

import moeq

TIME_FACTOR, MEMORY_FACTOR = 1.5, 1.15
"""What is told may be wrong by at most so much, either way."""


class Cost(NamedTuple):
    """Seconds by the clock, seconds of processors, and bytes beyond Python and its packages."""

    seconds: float
    processor: float
    memory: int


def told(options: argparse.Namespace) -> Cost:
    """Return what is told, in a process of its own; it takes some seconds itself."""
    found = _quantize(options, dry_run=True).estimate
    costs = [cost for cost in (found.measuring, found.rounding) if cost is not None]
    device = torch.device("cpu")
    return Cost(sum(cost.seconds(device) for cost in costs), 0, found.memory_bytes)


def taken(options: argparse.Namespace) -> Cost:
    """Quantize, in a process of its own, whose start counts."""
    import transformers.models.auto.modeling_auto  # noqa: F401

    import moeq.pipeline  # noqa: F401

    process = psutil.Process()
    before = process.memory_info().rss
    _quantize(options, dry_run=False)
    seconds = time.time() - process.create_time()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Cost(seconds, used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss - before)


def _quantize(options: argparse.Namespace, dry_run: bool) -> moeq.QuantizedModel:
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "packed"
        return moeq.quantize(
            options.model, output, bits=options.bits, calib=options.calib, dry_run=dry_run
        )


def verdict(said: list[Cost], took: list[Cost]) -> list[str]:
    """Say whether time and memory were told well enough."""
    lines = []
    for what, factor, part in (
        ("time", TIME_FACTOR, lambda cost: cost.seconds),
        ("memory", MEMORY_FACTOR, lambda cost: cost.memory),
    ):
        ratio = median(map(part, said)) / median(map(part, took))
        met = "met" if 1 / factor <= ratio <= factor else "MISSED"
        lines.append(f"- **{met}**: {what} told within a factor of {factor:g}: {ratio:.2f} times.")
    return lines


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--calib", default="default", help="as in moeq quantize")
    parser.add_argument("--bits", type=float, default=2.5, help="default 2.5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all")
    parser.add_argument("--rounds", type=int, default=2, help="default 2")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    said: list[Cost] = []
    took: list[Cost] = []
    for _ in range(options.rounds):
        for work, costs in ((told, said), (taken, took)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                costs.append(pool.apply(work, (options,)))
            print(work.__name__, costs[-1], flush=True)
    rows = [
        [name, *(f"{part(cost):.3g}" if part(cost) else "-" for cost in (*said, *took))]
        for name, part in (
            ("seconds", lambda cost: cost.seconds),
            ("processor seconds", lambda cost: cost.processor),
            ("memory beyond Python and its packages, GB", lambda cost: cost.memory / 1e9),
        )
    ]
    head = ["", *["told"] * len(said), *["taken"] * len(took)]
    name = f"told and taken: {options.model.resolve().name}, {options.threads} threads"
    about = (
        f"`moeq quantize --bits {options.bits:g}` with all other options as they are by default, "
        "and its `--dry-run` before each."
    )
    parts = ["\n".join(verdict(said, took)), about, table(head, rows)]
    write_section(options.results, "Cost of calibration", name, parts)


if __name__ == "__main__":
    main()
