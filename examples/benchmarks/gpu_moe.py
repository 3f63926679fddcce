"""Measures the Triton kernel on a GPU against the other kernels that serve such layers.

One table for each shape: uniform and skewed routing, 1 to 4096 tokens. What fails is reported, and
the rest goes on. Every figure is written as soon as it is measured.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpu_contenders import contenders as other_contenders
from results import RESULTS, table, write_section

from moeq.bench import SHAPES, Shape, UsageError, Widths
from moeq.bench.gpu import (
    Figures,
    GpuContender,
    copy_bandwidth,
    draw_calls,
    figures,
    moeq_contender,
    moved_bytes,
    relative_error,
    replay,
    time_interleaved,
)
from moeq.bench.settings import SMALLEST_RUNS
from vllm_moeq.kernels import select_kernel

GROUP_SIZE = 128
MIX, UNIFORM = Widths((3, 2)), Widths((4,))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
ROUTINGS = ("uniform", "skewed")
SHARDS = {
    "mixtral-tp8": Shape("mixtral-tp8", 4096, 1792, 8, 2),
    "qwen3-tp2": Shape("qwen3-tp2", 2048, 384, 128, 8),
}
"""What one of several GPUs holds of a layer."""
ALL_SHAPES = {name: SHAPES[name] for name in ("mixtral", "qwen3", "olmoe")} | SHARDS
NO_MEASUREMENT = (
    "**This is no measurement**: it ran on a CPU, in Triton's interpreter, to test the benchmark."
)

Make = Callable[[Shape, int, torch.device], GpuContender]


@dataclass(slots=True)
class Table:
    """What was found for one shape.

    Attributes:
        shape: The layer.
        tokens: Numbers of tokens.
        names: Contenders, in the order of the table.
        timed: Whether times are those of a GPU; others are not shown.
        figures: By (routing, tokens, contender).
        failures: Why a contender has no figures, by the same.
    """

    shape: Shape
    tokens: Sequence[int]
    names: list[str]
    timed: bool = True
    figures: dict[tuple[str, int, str], Figures] = field(default_factory=dict)
    failures: dict[tuple[str, int, str], str] = field(default_factory=dict)

    def fail(self, name: str, reason: str) -> None:
        """Note that nothing of a contender can be measured."""
        for routing in ROUTINGS:
            for tokens in self.tokens:
                self.failures[routing, tokens, name] = reason

    def render(self, routing: str, bandwidth: float) -> str:
        """Return one routing as Markdown."""
        header = ["tokens, contender", "µs", "IQR", "of the HBM floor", "MB read", "error"]
        lines = []
        for tokens in self.tokens:
            for name in self.names:
                key = (routing, tokens, name)
                if key in self.figures:
                    found = self.figures[key]
                    times = ["not measured", "", ""]
                    if self.timed:
                        share = found.floor_share(bandwidth)
                        times = [f"{found.us:.1f}", f"{found.us_iqr:.1f}", f"{share:.0%}"]
                    cells = [*times, f"{found.read_bytes / 1e6:.2f}", f"{found.error:.1e}"]
                else:
                    reason = self.failures.get(key, "the time was over")
                    cells = [f"not measured: {reason}", "", "", "", ""]
                lines.append([f"{tokens}, {name}", *cells])
        return table(header, lines)


def one_line(error: Exception) -> str:
    """Return an error as a cell of a table."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:150]}".replace("|", "/")


def measure(
    found: Table,
    makers: Sequence[tuple[str, Make]],
    runs: int,
    device: torch.device,
    deadline: float,
    written: Callable[[], None],
) -> None:
    """Fill a table; calls ``written`` after each number of tokens."""
    made: dict[str, GpuContender] = {}
    for name, make in makers:
        try:
            made[name] = make(found.shape, GROUP_SIZE, device)
        except Exception as error:  # of another project's code: whatever it raises
            found.fail(name, one_line(error))
        print(f"{found.shape.name}: {name}: {'made' if name in made else 'failed'}", flush=True)
    generator = torch.Generator().manual_seed(0)
    for tokens in found.tokens:
        for routing in ROUTINGS:
            if time.monotonic() > deadline:
                return
            _measure_case(found, made, routing, tokens, generator, runs, device)
        written()


def _measure_case(
    found: Table,
    made: dict[str, GpuContender],
    routing: str,
    tokens: int,
    generator: torch.Generator,
    runs: int,
    device: torch.device,
) -> None:
    calls = draw_calls(
        found.shape, tokens, skewed=routing == "skewed", generator=generator, device=device
    )
    errors: dict[str, float] = {}
    replays: dict[str, Callable[[], None]] = {}
    try:
        with ExitStack() as stack:
            for name, contender in made.items():
                try:
                    error = relative_error(contender, calls[0])
                    replays[name] = stack.enter_context(replay(contender, calls))
                    errors[name] = error
                except Exception as problem:
                    found.failures[routing, tokens, name] = one_line(problem)
            seconds = time_interleaved(list(replays.values()), runs, device)
    except Exception as problem:  # a fault on the device, which nobody can be blamed for any more
        for name in replays:
            found.failures[routing, tokens, name] = one_line(problem)
        return
    for name, times in zip(replays, seconds, strict=True):
        read = moved_bytes(made[name], found.shape, calls)
        found.figures[routing, tokens, name] = figures(times, len(calls), read, errors[name])


def our_makers(kernel: int) -> list[tuple[str, Make]]:
    """Return our own layers by name."""

    def maker(name: str, widths: Widths) -> Make:
        return lambda shape, group_size, device: moeq_contender(
            name, shape, widths, group_size, kernel, device
        )

    names = {f"moeq {MIX.label} bits": MIX, "moeq 4 bits": UNIFORM}
    return [(name, maker(name, widths)) for name, widths in names.items()]


def write(found: Table, path: Path, bandwidth: float, runs: int) -> None:
    """Write the section of a shape."""
    shape = found.shape
    intro = (
        f"One fused MoE layer: hidden size {shape.hidden_size}, intermediate size "
        f"{shape.intermediate_size}, {shape.experts} experts, {shape.top_k} per token, group size "
        f"{GROUP_SIZE}. Random weights and tokens. Time of a call in a CUDA graph of several "
        "calls, each with other tokens and another routing, on copies of the weights that no cache "
        f"holds; median of {runs} interleaved replays. The floor is what a call must move (weights "
        f"of the touched experts, activations) at the {bandwidth / 1e9:.0f} GB/s of a large copy "
        "on this GPU. Error: of the output against float64, relative, with each contender's own "
        "weights."
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
    parser.add_argument("--seconds", type=float, default=1500, help="for all (default 1500)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--ours", action="store_true", help="only our own kernel")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    if options.runs < SMALLEST_RUNS:
        parser.error(f"argument --runs: {options.runs} is less than {SMALLEST_RUNS}")
    device = torch.device(options.device)
    try:
        kernel = select_kernel(device, "triton")
        shapes = [ALL_SHAPES.get(name) or Shape.parse(name) for name in options.shapes]
    except (UsageError, ValueError, AssertionError, RuntimeError) as error:
        parser.error(str(error))
    makers = our_makers(kernel)
    if not options.ours:
        makers += other_contenders(MIX, list(options.tokens))
    start = time.monotonic()
    with torch.no_grad():
        bandwidth = copy_bandwidth(device)
        for index, shape in enumerate(shapes):
            now = time.monotonic()
            share = (start + options.seconds - now) / (len(shapes) - index)
            found = Table(shape, options.tokens, [n for n, _ in makers], device.type == "cuda")

            def written(found: Table = found) -> None:
                write(found, options.results, bandwidth, options.runs)

            measure(found, makers, options.runs, device, now + share, written)
            written()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
