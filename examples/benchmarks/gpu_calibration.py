"""Measures what rounding one expert with GPTQ costs: seconds, memory, and what it gains.

The expert has random weights and gets random tokens, as many as one of Mixtral-8x7B's gets of 128
sequences of 512. Reading, running the rest of the layer and writing are not in it. The first expert
also pays for starting the device's libraries, so another is rounded before. On a CPU, seconds of
its cores count too: they hardly change with what else runs there.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from results import RESULTS, table, write_section

from moeq.bench import GB, SHAPES, Shape, UsageError
from moeq.rounding import quantize_by_inputs

GROUP_SIZE = 128
BITS = (2, 3, 4)
TOKENS = 128 * 512 * 2 // 8
WARM_UP = Shape("warm-up", 256, 256, 1, 1)


class Rounded(NamedTuple):
    """What one matrix cost.

    Attributes:
        seconds: Until all results are on the device.
        cpu_seconds: Of all cores together.
        gain: Error of the output over that of rounding to nearest.
    """

    seconds: float
    cpu_seconds: float
    gain: float


def round_matrix(
    weight: torch.Tensor, x: torch.Tensor, router: torch.Tensor, bits: int, *, moved: bool
) -> Rounded:
    """Round a matrix [N, K] for inputs [n, K]; ``moved`` to wanted outputs, as w2 is."""
    wanted = [x * router @ weight.T] if moved else None
    _synchronize(weight.device)
    start, cpu_start = time.monotonic(), time.process_time()
    found = quantize_by_inputs([weight], [x], [router], [bits], GROUP_SIZE, wanted=wanted)
    _synchronize(weight.device)
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    nearest = quantize_by_inputs([weight], [x], [router], [bits], GROUP_SIZE, method="rtn")
    errors = [
        (x * router @ (rounded[bits][0].dequantize(bits, GROUP_SIZE) - weight).T).norm()
        for rounded in (found, nearest)
    ]
    return Rounded(seconds, cpu_seconds, float(errors[0] / errors[1]))


def round_expert(
    shape: Shape, tokens: int, bits: int, device: torch.device
) -> tuple[Rounded, Rounded]:
    """Round w13 and w2 of a random expert."""
    torch.manual_seed(0)
    router = torch.rand(tokens, 1, device=device)
    results = []
    for rows, columns, moved in (
        (2 * shape.intermediate_size, shape.hidden_size, False),
        (shape.hidden_size, shape.intermediate_size, True),
    ):
        weight = torch.randn(rows, columns, device=device) / columns**0.5
        # Columns that go together, as those of activations do: else there is nothing to gain.
        mixed = torch.randn(tokens, 64, device=device) @ torch.randn(64, columns, device=device)
        x = torch.randn(tokens, columns, device=device) + mixed / 8
        results.append(round_matrix(weight, x, router, bits, moved=moved))
    return results[0], results[1]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write(
    rows: dict[int, tuple[Rounded, Rounded]], shape: Shape, tokens: int, peak: int, path: Path
) -> None:
    """Write the section."""
    intro = (
        f"One expert of hidden size {shape.hidden_size} and intermediate size "
        f"{shape.intermediate_size}, {tokens} tokens, group size {GROUP_SIZE}: rounding w13 and w2 "
        "with GPTQ and its refinement. Error: of the outputs, over that of rounding to nearest."
    )
    if not peak:
        intro += " Seconds an expert are those of a clock: what else ran there is in them."
    parts = [
        intro,
        table(
            [
                "bits", "seconds an expert", "w13", "w2", "CPU seconds", "error w13", "error w2",
            ],
            [
                [
                    str(bits), f"{w13.seconds + w2.seconds:.1f}", f"{w13.seconds:.1f}",
                    f"{w2.seconds:.1f}", f"{w13.cpu_seconds + w2.cpu_seconds:.1f}",
                    f"{w13.gain:.2f}", f"{w2.gain:.2f}",
                ]
                for bits, (w13, w2) in rows.items()
            ],
        ),
    ]  # fmt: skip
    if peak:
        parts.append(f"Peak memory of the device: {peak / GB:.1f} GB.")
    name = "GPTQ on a GPU" if peak else f"GPTQ on a CPU, {torch.get_num_threads()} thread(s)"
    write_section(path, "Cost of calibration", name, parts)


@torch.no_grad()
def main() -> None:
    """Measure, and write the section after each width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mixtral", help="as in moeq bench (default mixtral)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"default {TOKENS}")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS, help="default 2 3 4")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=150, help="no width starts after (150)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    try:
        shape = SHAPES.get(options.shape) or Shape.parse(options.shape)
    except UsageError as error:
        parser.error(str(error))
    device = torch.device(options.device)
    deadline = time.monotonic() + options.seconds
    rows: dict[int, tuple[Rounded, Rounded]] = {}
    round_expert(WARM_UP, 256, options.bits[0], device)
    for bits in options.bits:
        if time.monotonic() > deadline:
            break
        rows[bits] = round_expert(shape, options.tokens, bits, device)
        seconds, cpu_seconds, _ = map(sum, zip(*rows[bits], strict=True))
        print(f"{bits} bits: {seconds:.1f} s an expert, {cpu_seconds:.1f} s of cores", flush=True)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        write(rows, shape, options.tokens, peak, options.results)


if __name__ == "__main__":
    main()
