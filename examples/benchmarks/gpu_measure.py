"""Measures one peer beside our kernel, in a process of its own, which gpu_moe.py starts.

Makes and compiles everything, appends ``{"ready": true}`` to a file, waits for a line on standard
input with the seconds that it may take, then appends what it finds, case by case, as lines of JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_contenders import contenders

from moeq.bench import SHAPES, Shape, Widths
from moeq.bench.gpu import (
    GpuContender,
    draw_calls,
    figures,
    moeq_contender,
    moved_bytes,
    relative_error,
    replay,
    time_interleaved,
)
from vllm_moeq.kernels import select_kernel

GROUP_SIZE = 128
MIX, UNIFORM = Widths((3, 2)), Widths((4,))
OURS, OURS_UNIFORM = f"moeq {MIX.label} bits", "moeq 4 bits"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
ROUTINGS = ("uniform", "skewed")
SHARDS = {
    "mixtral-tp8": Shape("mixtral-tp8", 4096, 1792, 8, 2),
    "qwen3-tp2": Shape("qwen3-tp2", 2048, 384, 128, 8),
}
"""What one of several GPUs holds of a layer."""
ALL_SHAPES = {name: SHAPES[name] for name in ("mixtral", "qwen3", "olmoe")} | SHARDS

Make = Callable[[Shape, int, torch.device], GpuContender]
Note = Callable[..., None]
"""Takes fields of a line."""


def peers(tokens: Sequence[int]) -> dict[str, Make]:
    """Return how the other kernels are made, by name."""
    return dict(contenders(MIX, list(tokens)))


def makers(peer: str, tokens: Sequence[int], kernel: int) -> dict[str, Make]:
    """Return what a process measures: ours first, with a peer or, without, at two plans."""

    def ours(widths: Widths) -> Make:
        return lambda shape, group_size, device: moeq_contender(
            "moeq", shape, widths, group_size, kernel, device
        )

    other = {peer: peers(tokens)[peer]} if peer else {OURS_UNIFORM: ours(UNIFORM)}
    return {OURS: ours(MIX)} | other


def prepare(
    shape: Shape, makes: dict[str, Make], tokens: Sequence[int], device: torch.device, note: Note
) -> dict[str, GpuContender]:
    """Make contenders and let them compile for every number of tokens; note those that fail."""
    made: dict[str, GpuContender] = {}
    generator = torch.Generator().manual_seed(0)
    for name, make in makes.items():
        try:
            contender = make(shape, GROUP_SIZE, device)
            for number in tokens:
                call, *_ = draw_calls(
                    shape, number, skewed=False, generator=generator, device=device
                )
                contender.run(0, *call)
            made[name] = contender
        except Exception as error:  # of another project's code: whatever it raises
            note(name=name, failure=one_line(error))
    return made


def measure(
    shape: Shape,
    made: dict[str, GpuContender],
    tokens: Sequence[int],
    runs: int,
    device: torch.device,
    deadline: float,
    note: Note,
    baseline: str = "",
) -> None:
    """Measure contenders in turn until a time of ``time.monotonic``; the first is the baseline.

    The errors of a contender named ``baseline`` are left out: another process finds them.
    """
    generator = torch.Generator().manual_seed(0)
    for number in tokens:
        for routing in ROUTINGS:
            if time.monotonic() > deadline:
                return
            calls = draw_calls(
                shape, number, skewed=routing == "skewed", generator=generator, device=device
            )
            for line in _measure_case(shape, made, calls, runs, device, baseline):
                note(routing=routing, tokens=number, **line)


def _measure_case(
    shape: Shape,
    made: dict[str, GpuContender],
    calls: list[Any],
    runs: int,
    device: torch.device,
    baseline: str,
) -> list[dict[str, Any]]:
    """Return what was found, or why nothing was, for each contender."""
    lines: list[dict[str, Any]] = []
    errors: dict[str, float] = {}
    replays: dict[str, Callable[[], None]] = {}
    try:
        with ExitStack() as stack:
            for name, contender in made.items():
                try:
                    error = float("nan")
                    if name != baseline:
                        error = relative_error(contender, calls[0])
                    replays[name] = stack.enter_context(replay(contender, calls))
                    errors[name] = error
                except Exception as problem:
                    lines.append({"name": name, "failure": one_line(problem)})
            seconds = time_interleaved(list(replays.values()), runs, device)
    except Exception as problem:  # a fault on the device, which nobody can be blamed for any more
        return [{"name": name, "failure": one_line(problem)} for name in made]
    for name, times in zip(replays, seconds, strict=True):
        read = moved_bytes(made[name], shape, calls)
        found = figures(times, len(calls), read, errors[name])
        ratio = None
        if OURS in replays:
            ratio = median(a / b for a, b in zip(times, seconds[0], strict=True))
        lines.append({"name": name, "figures": asdict(found), "ratio": ratio})
    return lines


def one_line(error: Exception) -> str:
    """Return an error as a cell of a table."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:150]}".replace("|", "/")


def main() -> None:
    """Prepare, wait, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--peer", default="", help="default: none, only our kernel")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--lines", type=Path, required=True, help="the file to append to")
    options = parser.parse_args()
    device = torch.device(options.device)
    shape = ALL_SHAPES.get(options.shape) or Shape.parse(options.shape)

    def note(**fields: Any) -> None:
        with options.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    with torch.no_grad():
        makes = makers(options.peer, options.tokens, select_kernel(device, "triton"))
        made = prepare(shape, makes, options.tokens, device, note)
        if options.peer and options.peer not in made:
            return
        if device.type == "cuda":
            torch.cuda.synchronize()
        note(ready=True)
        if seconds := sys.stdin.readline():
            deadline = time.monotonic() + float(seconds)
            measure(
                shape, made, options.tokens, options.runs, device, deadline, note,
                OURS if options.peer else "",
            )  # fmt: skip


if __name__ == "__main__":
    main()
