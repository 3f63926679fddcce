"""Measures how fast one core quantizes, packs and unpacks weights."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results import RESULTS, table, write_section

from moeq.rounding import quantize_rtn
from vllm_moeq.format import WIDTHS, pack, unpack

MATRICES = {"Qwen3-30B-A3B": (768, 2048), "Mixtral-8x7B": (14336, 4096)}
"""Model to the shape of an expert's gate projection: from cache-sized to far larger."""
RTN_ROWS = 1024
REQUIRED = 150


def speeds(work: Callable[[], object], weights: int, runs: int) -> list[float]:
    """Return MB/s of bfloat16 weights for each of several runs, after one to warm up."""
    work()
    result = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        result.append(2 * weights / 1e6 / (time.perf_counter() - start))
    return result


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9, help="of each measurement (default 9)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(0)
    rows, slowest_pack = [], float("inf")
    for bits in WIDTHS:
        cells = []
        for shape in MATRICES.values():
            codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
            packed = pack(codes, bits)
            packing = speeds(lambda: pack(codes, bits), codes.numel(), options.runs)  # noqa: B023
            unpacking = speeds(lambda: unpack(packed, bits), codes.numel(), options.runs)  # noqa: B023
            slowest_pack = min(slowest_pack, statistics.median(packing))
            cells += [_cell(packing), _cell(unpacking)]
        weight = torch.randn(RTN_ROWS, 2048, generator=generator).bfloat16()
        rounding = speeds(lambda: quantize_rtn(weight, bits, 128), weight.numel(), options.runs)  # noqa: B023
        rows.append([str(bits), *cells, _cell(rounding)])
        print(*rows[-1])

    verdict = "meets" if slowest_pack >= REQUIRED else "MISSES"
    write_section(
        options.results,
        "Speed on a CPU",
        "packing",
        [
            "How fast does one core pack? Packing at the slowest width takes in "
            f"{slowest_pack:.0f} MB/s of bfloat16 weights, which {verdict} the requirement of "
            f"{REQUIRED} MB/s; searching the grid (`quantize_rtn`) takes most of the time of a "
            "conversion.",
            f"MB/s of bfloat16 weights, median of {options.runs} runs (slowest–fastest). Large "
            "matrices are slower because the temporaries leave the cache.",
            table(
                [
                    "bits",
                    *(
                        f"{name} {rows}×{columns}, {model}"
                        for model, (rows, columns) in MATRICES.items()
                        for name in ("pack", "unpack")
                    ),
                    "`quantize_rtn`, group size 128",
                ],
                rows,
            ),
        ],
    )


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})"


if __name__ == "__main__":
    main()
