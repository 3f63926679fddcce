"""Measures the Triton kernel on a GPU against the other kernels that serve such layers.

One table for each shape: uniform and skewed routing, 1 to 4096 tokens. Each of the other kernels
has a process of its own, in which ours takes turns with it: one that fails, hangs or is slow costs
no other. All processes get ready at the same time, then they measure one after another. The table
is written after each of them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_measure import (
    ALL_SHAPES,
    GROUP_SIZE,
    OURS,
    OURS_UNIFORM,
    ROUTINGS,
    TOKENS,
    peers,
)
from results import RESULTS, table, write_section

from moeq.bench import Shape, UsageError
from moeq.bench.gpu import Figures, copy_bandwidth
from moeq.bench.settings import SMALLEST_RUNS
from vllm_moeq.kernels import select_kernel

PREPARATION = 0.55
"""Share of the time after which what is not ready is given up; importing vLLM alone took 40 s."""
PATIENCE = 10.0
"""Seconds that a process may take beyond its time, for the case that it is at."""
NO_MEASUREMENT = (
    "**This is no measurement**: it ran on a CPU, in Triton's interpreter, to test the benchmark."
)


@dataclass(slots=True)
class Table:
    """What was found for one shape.

    Attributes:
        shape: The layer.
        tokens: Numbers of tokens.
        names: Contenders, in the order of the table.
        timed: Whether times are those of a GPU; others are not shown.
        figures: By (routing, tokens, contender).
        ratios: Time over that of our kernel in the same process, by the same.
        failures: Why a contender has no figures, by the same.
    """

    shape: Shape
    tokens: Sequence[int]
    names: list[str]
    timed: bool = True
    figures: dict[tuple[str, int, str], Figures] = field(default_factory=dict)
    ratios: dict[tuple[str, int, str], float] = field(default_factory=dict)
    failures: dict[tuple[str, int, str], str] = field(default_factory=dict)

    def fail(self, name: str, reason: str) -> None:
        """Note why nothing more of a contender can be measured."""
        for routing in ROUTINGS:
            for tokens in self.tokens:
                self.failures.setdefault((routing, tokens, name), reason)

    def add(self, line: dict[str, Any]) -> None:
        """Add what a process noted."""
        if "routing" not in line:
            self.fail(line["name"], line["failure"])
            return
        key = (line["routing"], line["tokens"], line["name"])
        if "failure" in line:
            self.failures[key] = line["failure"]
            return
        self.figures[key] = Figures(**line["figures"])
        if line["ratio"] is not None:
            self.ratios[key] = line["ratio"]

    def render(self, routing: str, bandwidth: float) -> str:
        """Return one routing as Markdown."""
        header = [
            "tokens, contender", "µs", "IQR", f"time / {OURS}", "of the HBM floor", "MB read",
            "error",
        ]  # fmt: skip
        lines = []
        for tokens in self.tokens:
            for name in self.names:
                key = (routing, tokens, name)
                if key in self.figures:
                    found = self.figures[key]
                    times = ["not measured", "", "", ""]
                    if self.timed:
                        ratio = f"{self.ratios[key]:.2f}" if key in self.ratios else ""
                        share = found.floor_share(bandwidth)
                        times = [f"{found.us:.1f}", f"{found.us_iqr:.1f}", ratio, f"{share:.0%}"]
                    cells = [*times, f"{found.read_bytes / 1e6:.2f}", f"{found.error:.1e}"]
                else:
                    reason = self.failures.get(key, "the time was over")
                    cells = [f"not measured: {reason}", "", "", "", "", ""]
                lines.append([f"{tokens}, {name}", *cells])
        return table(header, lines)


class Process:
    """A process that measures a peer beside our kernel, or our kernel alone."""

    def __init__(self, peer: str, command: Sequence[str], folder: Path) -> None:
        self.peer = peer
        self._lines = folder / f"{peer or 'ours'}.jsonl".replace("/", "-")
        self._process = subprocess.Popen(
            [*command, "--peer", peer, "--lines", str(self._lines)],
            stdin=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def lines(self) -> list[dict[str, Any]]:
        """Return what it has noted; a line that a kill cut off is left out."""
        if not self._lines.exists():
            return []
        text = self._lines.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]

    def is_ready(self) -> bool:
        """Say whether it waits for its turn, or has ended before."""
        return self._process.poll() is not None or any("ready" in line for line in self.lines())

    def measure(self, seconds: float) -> str:
        """Let it measure; return why it has noted no more, if it did not end by itself."""
        try:
            self._process.communicate(f"{seconds}\n", timeout=seconds + PATIENCE)
        except subprocess.TimeoutExpired:
            self.stop()
            return "it took too long"
        status = self._process.returncode
        return f"its process ended with status {status}" if status else ""

    def stop(self) -> None:
        """End it, with the compilers that it may have started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def measure(
    found: Table,
    names: Sequence[str],
    command: Sequence[str],
    seconds: float,
    written: Callable[[], None],
) -> None:
    """Fill a table.

    Args:
        found: The table.
        names: Peers; an empty name is our kernel alone.
        command: Of a process, without what differs.
        seconds: For all.
        written: Called after each process.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        processes = [Process(name, command, Path(folder)) for name in names]
        try:
            while not all(process.is_ready() for process in processes):
                if time.monotonic() > start + PREPARATION * seconds:
                    break
                time.sleep(0.2)
            late = [process for process in processes if not process.is_ready()]
            for process in late:
                process.stop()
                reason = f"not ready after {PREPARATION * seconds:.0f} s"
                _merge(found, process, reason)
            turns = [process for process in processes if process not in late]
            for place, process in enumerate(turns):
                left = start + seconds - time.monotonic()
                reason = process.measure(max(0.0, left / (len(turns) - place)))
                _merge(found, process, reason)
                print(f"{found.shape.name}: {process.peer or OURS}: {reason or 'done'}", flush=True)
                written()
        finally:
            for process in processes:
                process.stop()


def _merge(found: Table, process: Process, reason: str) -> None:
    """Add a process's lines; of our kernel only those of the process that has no peer."""
    own = (process.peer,) if process.peer else (OURS, OURS_UNIFORM)
    for line in process.lines():
        if line.get("name") in own:
            found.add(line)
    if reason:
        for name in own:
            found.fail(name, reason)


def write(found: Table, path: Path, bandwidth: float, runs: int) -> None:
    """Write the section of a shape."""
    shape = found.shape
    intro = (
        f"One fused MoE layer: hidden size {shape.hidden_size}, intermediate size "
        f"{shape.intermediate_size}, {shape.experts} experts, {shape.top_k} per token, group size "
        f"{GROUP_SIZE}. Random weights and tokens. Time of a call in a CUDA graph of several "
        "calls, each with other tokens and another routing, on copies of the weights that no cache "
        f"holds; median of {runs} interleaved replays. Each peer ran in a process of its own, "
        f"where {OURS} took turns with it: ratios are from there, medians of what neighbouring "
        "replays give; our own rows are from a process without a peer. The floor is what a call "
        "must move (weights of the touched experts, activations) at the "
        f"{bandwidth / 1e9:.0f} GB/s of a large copy on this GPU. Error: of the "
        "output against float64, relative, with each contender's own weights."
    )
    parts = [intro] if found.timed else [NO_MEASUREMENT]
    for routing in ROUTINGS:
        parts += [f"{routing.capitalize()} routing:", found.render(routing, bandwidth)]
    write_section(
        path,
        "Speed on a GPU",
        f"GPU kernel: {shape.name}",
        parts,
        packages=("torch", "triton", "vllm-moeq", "vllm", "humming-kernels"),
    )


def main() -> None:
    """Measure, and write a section for each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", default=list(ALL_SHAPES), metavar="SHAPE",
        help=f"of {', '.join(ALL_SHAPES)}, or four sizes as in moeq bench",
    )  # fmt: skip
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--runs", type=int, default=15, help="timed replays (default 15)")
    parser.add_argument("--seconds", type=float, default=200, help="for a shape (default 200)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--peers", nargs="*", metavar="NAME", help=f"default: {', '.join(peers(TOKENS))}"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    if options.runs < SMALLEST_RUNS:
        parser.error(f"argument --runs: {options.runs} is less than {SMALLEST_RUNS}")
    known = list(peers(options.tokens))
    names = known if options.peers is None else options.peers
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"argument --peers: {unknown[0]!r} is none of {', '.join(known)}")
    device = torch.device(options.device)
    try:
        select_kernel(device, "triton")
        shapes = {name: ALL_SHAPES.get(name) or Shape.parse(name) for name in options.shapes}
    except (UsageError, ValueError, AssertionError, RuntimeError) as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left behind
    bandwidth = copy_bandwidth(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for name, shape in shapes.items():
        rows = [OURS, OURS_UNIFORM, *names]
        found = Table(shape, options.tokens, rows, device.type == "cuda")

        def written(found: Table = found) -> None:
            write(found, options.results, bandwidth, options.runs)

        command = [
            sys.executable, str(Path(__file__).with_name("gpu_measure.py")), "--shape", name,
            "--runs", str(options.runs), "--device", options.device,
            "--tokens", *map(str, options.tokens),
        ]  # fmt: skip
        measure(found, ["", *names], command, options.seconds, written)
        written()


if __name__ == "__main__":
    main()
