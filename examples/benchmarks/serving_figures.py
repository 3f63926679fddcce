"""The figures of ``cpu_serving.py``, and the section of RESULTS that they make."""

import argparse
import statistics

from results import table, write_section

Figures = dict[str, list[float]]  # by name
Report = dict[str, dict[str, Figures]]  # by way to run vLLM, then by variant

BITS = "2.5"
BF16, PACKED = "bf16", "packed"
KV_CACHE_GIB = 1
CONCURRENT = (1, 8)
SHORT_PROMPT = 16
FIRST_START, START = "first start-up, compiling, s", "start-up, s"
PREFILL = "prefill, tokens/s"
DECODE = {count: f"decode, {count} at once, tokens/s" for count in CONCURRENT}
MEMORY_READY, MEMORY = "memory after start-up, GB", "memory after the work, GB"
MEMORY_PEAK = "memory at its peak, GB"
REQUIRED_SPEED_UPS = {PREFILL: 3.0, DECODE[1]: 3.0, DECODE[8]: 4.0}
REQUIRED_MEMORY = 0.25
"""Of bf16, both without the KV cache."""


def ratio(figures: dict[str, Figures], variant: str, name: str) -> float:
    """Return a variant over bf16, from the medians."""
    bf16, packed = (statistics.median(figures[which][name]) for which in (BF16, variant))
    return packed / bf16


def memory_share(figures: dict[str, Figures], variant: str) -> float:
    """Return the memory of a variant over that of bf16, both without the KV cache."""
    bf16, packed = (statistics.median(figures[which][MEMORY]) for which in (BF16, variant))
    cache = (KV_CACHE_GIB << 30) / 1e9
    return (packed - cache) / (bf16 - cache)


def cells(figures: dict[str, Figures], name: str) -> list[str]:
    """Return the table's cells of one figure: each variant's median, spread, and ratio to bf16."""
    if name not in figures[BF16]:
        return [""] * len(figures)
    result = []
    for variant in figures:
        values = figures[variant][name]
        spread = f" ({min(values):.4g}–{max(values):.4g})" if len(values) > 1 else ""
        times = "" if variant == BF16 else f" × {ratio(figures, variant, name):.2f}"
        result.append(f"{statistics.median(values):.4g}{spread}{times}")
    return result


def verdict(report: Report, variant: str, weights: dict[str, int]) -> str:
    """Say whether a variant is what was expected."""

    def sentence(what: str, values: list[str], met: bool, expected: str) -> str:
        return f"{what} {' and '.join(values)}, {'meets' if met else 'MISSES'} {expected}"

    facts = []
    for name, required in REQUIRED_SPEED_UPS.items():
        values = [ratio(figures, variant, name) for figures in report.values()]
        met, what = min(values) >= required, name.removesuffix(", tokens/s")
        facts.append(sentence(what, [f"{v:.2f}" for v in values], met, f"{required:g} times bf16"))
    shares = [memory_share(figures, variant) for figures in report.values()]
    facts.append(
        sentence(
            "memory of all processes without the KV cache",
            [f"{share:.1%}" for share in shares],
            max(shares) <= REQUIRED_MEMORY,
            f"{REQUIRED_MEMORY:.0%} of bf16",
        )
    )
    return (
        f"{BITS} bits, {variant} ({' and '.join(report)}): {'; '.join(facts)}. Its tensors take "
        f"{weights[variant] / weights[BF16]:.1%} "
        f"({weights[variant] / 1e9:.2f} of {weights[BF16] / 1e9:.2f} GB)."
    )


def write_report(
    report: Report, name: str, facts: list[str], rounds: int, options: argparse.Namespace
) -> None:
    """Write the section."""
    variants = next(iter(report.values()))
    header = ["", *(f"{mode}: {variant}" for mode in report for variant in variants)]
    names = dict.fromkeys(n for figures in report.values() for n in figures[BF16])
    rows = [[n, *(c for figures in report.values() for c in cells(figures, n))] for n in names]
    method = (
        f"Medians (smallest–largest) over {rounds} processes of each kind, in turns, with "
        f"{options.repeats} repetitions in each. Prefill: {options.prompt_tokens} tokens. Decode: "
        f"{options.new_tokens} tokens after a prompt of {SHORT_PROMPT}, less the time of an answer "
        "of one token. Memory: all processes of vLLM (Pss), mapped files included. Start-up: until "
        "the first request can be sent, the checkpoint not in the page cache; the first compiles."
    )
    write_section(
        options.results,
        "Speed on a CPU",
        name,
        [*facts, method, table(header, rows)],
        packages=("torch", "vllm", "vllm-moeq"),
    )
