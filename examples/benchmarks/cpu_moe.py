"""Measures the CPU kernel against vLLM's own, as `moeq bench` does, and judges it by its targets.

Shapes of three models, one thread and two, both precisions of activations.
"""

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from results import RESULTS, table, write_section

from moeq.bench import (
    ACTIVATION,
    GB,
    SHAPES,
    Machine,
    Row,
    Settings,
    UsageError,
    describe,
    layouts,
    measure,
    mix_excess,
    prepare,
    random_weights,
    rows,
)
from vllm_moeq import envs
from vllm_moeq.kernels import KERNELS

BITS, TOKENS, GROUP_SIZE = "2,3,4,8,2/3/4/8", "1,16,256", 128
PRECISIONS = ("int16", "int8")
ONE_TOKEN_RATIOS = {2: 5.5, 3: 4.4, 4: 3.9, 8: 2.0}
"""How many times as fast as vLLM one token must be, by width."""
BATCH_RATIOS = ((16, "int16", 4.0), (16, "int8", 4.0), (256, "int16", 1.5), (256, "int8", 3.0))
"""The same for (tokens, activations), at every width."""
BANDWIDTH_SHAPE, BANDWIDTH_SHARE = "mixtral", 0.9
"""On this shape one token must reach this share of the read bandwidth at every width."""
MIX_EXCESS = 0.05
"""What a mix may cost over its widths one by one, as a fraction."""
REPACK_RATE, REPACK_RUNS = 1.0, 3
"""GB/s of packed weights that each thread must repack when a model is loaded, and the runs."""


@dataclass(frozen=True, slots=True)
class Case:
    """What was found for one shape, number of threads and precision of activations.

    Attributes:
        activations: Precision inside our kernel.
        rows: All figures.
        mixes: For each number of tokens, what each mix costs over its widths, as a fraction.
        bandwidths: GB/s of reading memory.
        vllm: Which of vLLM's kernels ours is compared with.
    """

    activations: str
    rows: list[Row]
    mixes: dict[int, dict[str, float]]
    bandwidths: list[float]
    vllm: str

    @property
    def shape(self) -> str:
        """Name of the shape."""
        return self.rows[0].shape

    @property
    def setting(self) -> str:
        """Threads and activations."""
        return f"{count(self.rows[0].threads, 'thread')}, {self.activations}"


@dataclass(frozen=True, slots=True)
class Target:
    """One requirement and all the figures that must meet it, by what they were measured on."""

    text: str
    limit: float
    figures: dict[str, float]
    at_most: bool = False
    form: str = ".2f"

    def verdict(self) -> str:
        """Say whether all figures meet it, and else how many do not and which is the worst."""
        if not self.figures:
            return f"- not measured: {self.text}."
        sign = -1 if self.at_most else 1
        values = self.figures.values()
        missed = sum(sign * value < sign * self.limit for value in values)
        spread = f"{min(values):{self.form}} to {max(values):{self.form}}"
        if not missed:
            return f"- **met**: {self.text}: {spread}."
        worst = min(self.figures, key=lambda name: sign * self.figures[name])
        return (
            f"- **MISSED** in {missed} of {len(values)} cases: {self.text}: {spread}; the worst is "
            f"{worst}."
        )


def measure_shape(settings: list[Settings], machine: Machine) -> Iterator[Case]:
    """Measure one shape; the settings differ in threads only and share the weights."""
    contenders = prepare(settings[0], machine)
    for setting in settings:
        for precision in PRECISIONS:
            os.environ[envs.CPU_ACTIVATION.name] = precision
            measurement = measure(setting, machine, contenders)
            print(describe(measurement), end="\n\n", flush=True)
            # Not the measurement itself, which would keep the weights in memory.
            yield Case(
                activations=measurement.activations,
                rows=rows(measurement),
                mixes={tokens: mix_excess(measurement, tokens) for tokens in setting.tokens},
                bandwidths=measurement.bandwidths,
                vllm=contenders[-1].detail,
            )


def repack_rates(settings: Settings, machine: Machine) -> dict[str, float]:
    """Return how fast weights are brought into the kernel's layout: GB/s of each thread.

    As when a model is loaded, the result lies in memory that the process never had before.
    """
    torch.set_num_threads(settings.threads)
    rates = {}
    for widths, layout in zip(settings.bits, layouts(settings), strict=True):
        weights, seconds = random_weights(layout), []
        size = weights.w13_packed.nbytes + weights.w2_packed.nbytes
        for _ in range(REPACK_RUNS):
            start = time.perf_counter()
            KERNELS[machine.kernel].prepare(weights, layout, ACTIVATION)
            seconds.append(time.perf_counter() - start)
        where = f"{settings.shape.name}, {count(settings.threads, 'thread')}, {widths.label} bits"
        rates[where] = size / median(seconds) / settings.threads / GB
    return rates


def _ratio(row: Row) -> float:
    assert row.ratio_to_vllm is not None  # vLLM is always measured here
    return row.ratio_to_vllm


def targets(cases: list[Case], repacking: dict[str, float]) -> Iterator[Target]:
    """Yield all targets with what was measured."""
    yield Target(
        f"weights repacked at {REPACK_RATE:g} GB/s or more by each thread", REPACK_RATE, repacking
    )
    for bits, limit in ONE_TOKEN_RATIOS.items():
        yield Target(
            f"1 token at {bits} bits at least {limit} times as fast as vLLM",
            limit,
            {name: _ratio(row) for name, row in our_rows(cases, 1) if row.bits == bits},
        )
    for tokens, activations, limit in BATCH_RATIOS:
        chosen = [case for case in cases if case.activations == activations]
        yield Target(
            f"{tokens} tokens with {activations} activations at least {limit} times as fast as "
            "vLLM",
            limit,
            {name: _ratio(row) for name, row in our_rows(chosen, tokens)},
        )
    chosen = [case for case in cases if case.shape == BANDWIDTH_SHAPE]
    yield Target(
        f"1 token on {BANDWIDTH_SHAPE} at {BANDWIDTH_SHARE:.0%} of the read bandwidth or more",
        BANDWIDTH_SHARE,
        {name: row.bandwidth_share for name, row in our_rows(chosen, 1)},
        form=".0%",
    )
    yield Target(
        f"a mix at most {MIX_EXCESS:.0%} slower than its widths one by one",
        MIX_EXCESS,
        {
            f"{case.shape}, {case.setting}, {count(tokens, 'token')}, {mix}": excess
            for case in cases
            for tokens, mixes in case.mixes.items()
            for mix, excess in mixes.items()
        },
        at_most=True,
        form="+.1%",
    )


def our_rows(cases: list[Case], tokens: int) -> list[tuple[str, Row]]:
    """Return the rows of our kernel at a number of tokens, each with what it was measured on."""
    return [
        (f"{case.shape}, {case.setting}, {row.bits} bits", row)
        for case in cases
        for row in case.rows
        if (row.contender, row.tokens) == ("moeq", tokens)
    ]


def bandwidth_table(cases: list[Case]) -> str:
    """Return how fast memory was read, for each shape and setting."""

    def cell(case: Case) -> str:
        rates = case.bandwidths
        return f"{median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f})"

    return by_setting("GB/s", [(case.setting, case.shape, cell(case)) for case in cases])


def figures_table(cases: list[Case]) -> str:
    """Return all figures: a line for each shape, number of tokens and contender."""
    return by_setting(
        "layer",
        [
            (
                case.setting,
                f"{row.shape}, {count(row.tokens, 'token')}, {row.contender} {row.bits}",
                f"{row.ms_median:.2f} ({row.ms_iqr:.2f}) / {row.bandwidth_share:.0%} / "
                f"{row.ratio_to_vllm:.2f}",
            )
            for case in cases
            for row in case.rows
        ],
    )


def by_setting(title: str, cells: list[tuple[str, str, str]]) -> str:
    """Return a table of cells (setting, line, text) with a column for each setting."""
    texts = {(setting, line): text for setting, line, text in cells}
    settings, lines = (dict.fromkeys(keys) for keys in zip(*texts, strict=True))
    return table(
        [title, *settings], ([line, *(texts[s, line] for s in settings)] for line in lines)
    )


def count(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number} {noun}{'s' * (number > 1)}"


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="as in moeq bench")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default 1 2")
    parser.add_argument("--runs", type=int, default=9, help="of each contender (default 9)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    try:
        shapes = [
            [
                Settings.parse(
                    shape=shape,
                    bits=BITS,
                    tokens=TOKENS,
                    against="vllm",
                    group_size=GROUP_SIZE,
                    threads=threads,
                    runs=options.runs,
                )
                for threads in options.threads
            ]
            for shape in options.shapes
        ]
    except UsageError as error:
        parser.error(str(error))
    machine = Machine.detect()
    if machine.functions is None:
        parser.exit(1, f"the CPU kernel does not run here: {machine.isa}\n")
    repacking: dict[str, float] = {}
    for settings in shapes:
        for setting in settings:
            repacking |= repack_rates(setting, machine)
    cases = [case for settings in shapes for case in measure_shape(settings, machine)]
    write_section(
        options.results,
        "Speed on a CPU",
        f"CPU kernel, {machine.isa}",
        [
            f"How fast is one fused MoE layer on a CPU? Our kernel with {machine.isa}, group size "
            f"{GROUP_SIZE}, against {cases[0].vllm}. Each target stands for all shapes, threads, "
            "precisions of activations and widths that it does not name:",
            "\n".join(target.verdict() for target in targets(cases, repacking)),
            f"Median of {options.runs} interleaved runs, each with new tokens and routing, caches "
            "flushed before every call: milliseconds (between the quartiles) / share of the read "
            "bandwidth / times as fast as vLLM in the same run.",
            figures_table(cases),
            "The read bandwidth, median (slowest–fastest):",
            bandwidth_table(cases),
        ],
        packages=("torch", "vllm", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
