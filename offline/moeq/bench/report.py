"""What a measurement says: rows for programs, a table for people."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, median, quantiles

import torch

from moeq.bench.machine import GB
from moeq.bench.settings import Widths
from moeq.bench.timing import Measurement
from vllm_moeq._version import __version__


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one number of tokens.

    Attributes:
        shape: Name of the shape.
        tokens: How many ran through the layer at once.
        threads: OpenMP threads.
        contender: ``moeq``, ``vllm`` or ``reference``.
        bits: Width of all experts, or the mix as ``--bits`` has it.
        ms_median: Milliseconds of a call.
        ms_iqr: Milliseconds between the quartiles.
        gb_per_s: Median GB/s at which the weights of the touched experts were read.
        bandwidth_share: That, relative to reading memory and nothing else.
        ratio_to_vllm: Median of vLLM's time over this one's in the same round: above 1 is faster
            than vLLM. None if vLLM was not measured.
    """

    shape: str
    tokens: int
    threads: int
    contender: str
    bits: int | str
    ms_median: float
    ms_iqr: float
    gb_per_s: float
    bandwidth_share: float
    ratio_to_vllm: float | None


def rows(measurement: Measurement) -> list[Row]:
    """Return a row for each contender at each number of tokens."""
    return [
        _row(measurement, tokens, index)
        for tokens in measurement.rounds
        for index in range(len(measurement.contenders))
    ]


def _row(measurement: Measurement, tokens: int, index: int) -> Row:
    settings, contenders = measurement.settings, measurement.contenders
    rounds, contender = measurement.rounds[tokens], contenders[index]
    seconds = [done.seconds[index] for done in rounds]
    lower, _, upper = quantiles(seconds, n=4, method="inclusive")
    read = [sum(contender.expert_bytes[expert] for expert in done.experts) for done in rounds]
    rate = median(size / GB / time for size, time in zip(read, seconds, strict=True))
    vllm = next((i for i, other in enumerate(contenders) if other.name == "vllm"), None)
    ratio = None
    if vllm is not None:
        ratio = median(done.seconds[vllm] / done.seconds[index] for done in rounds)
    return Row(
        shape=settings.shape.name,
        tokens=tokens,
        threads=settings.threads,
        contender=contender.name,
        bits=contender.widths.label,
        ms_median=1e3 * median(seconds),
        ms_iqr=1e3 * (upper - lower),
        gb_per_s=rate,
        bandwidth_share=rate / median(measurement.bandwidths),
        ratio_to_vllm=ratio,
    )


def mix_excess(measurement: Measurement, tokens: int) -> dict[str, float]:
    """Return how much longer our kernel takes for each mix than for its widths one by one.

    The expected time of a round is the mean over the touched experts of what the layer took in
    that round with all experts at the width of this one: each width counts by the bytes that the
    mix reads of it. Mixes whose widths were not all measured are left out.

    Returns:
        Mix as ``--bits`` has it to the median excess over all rounds, as a fraction.
    """
    places = {
        contender.widths: index
        for index, contender in enumerate(measurement.contenders)
        if contender.name == "moeq"
    }
    result = {}
    for mix, place in places.items():
        uniform = [Widths((width,)) for width in mix.values]
        if len(uniform) > 1 and all(widths in places for widths in uniform):
            result[str(mix.label)] = median(
                done.seconds[place]
                / mean(done.seconds[places[Widths((mix.of(expert),))]] for expert in done.experts)
                - 1
                for done in measurement.rounds[tokens]
            )
    return result


def describe(measurement: Measurement) -> str:
    """Return the measurement as text: what was measured on what, a table, and what mixes cost."""
    return "\n".join((*_header(measurement), "", *_table(rows(measurement)), *_mixes(measurement)))


def _header(measurement: Measurement) -> Iterator[str]:
    settings, machine, rates = measurement.settings, measurement.machine, measurement.bandwidths
    shape = settings.shape
    lines = {
        "layer": f"{shape.name}: hidden size {shape.hidden_size}, intermediate size "
        f"{shape.intermediate_size}, {shape.experts} experts, {shape.top_k} per token",
        "CPU": f"{machine.processor}, {machine.cores} cores",
        "threads": str(settings.threads),
        "ISA": machine.isa,
        **{contender.name: contender.detail for contender in measurement.contenders},
        "activations": f"{measurement.activations} in moeq, bfloat16 outside",
        "group size": str(settings.group_size),
        "versions": f"vllm-moeq {__version__}, torch {torch.__version__}",
        "read bandwidth": f"{median(rates):.1f} GB/s ({min(rates):.1f} to {max(rates):.1f}), "
        f"read by {measurement.reader}",
        "runs": f"median of {settings.runs}, interleaved, new tokens and routing for each, "
        "caches flushed",
    }
    return (f"{name:<16} {text}" for name, text in lines.items())


def _table(measured: list[Row]) -> Iterator[str]:
    cells = [["tokens", "contender", "bits", "ms", "IQR", "GB/s", "of read", "x vLLM"]]
    for row in measured:
        ratio = "" if row.ratio_to_vllm is None else f"{row.ratio_to_vllm:.2f}"
        cells.append(
            [
                str(row.tokens),
                row.contender,
                str(row.bits),
                f"{row.ms_median:.3f}",
                f"{row.ms_iqr:.3f}",
                f"{row.gb_per_s:.2f}",
                f"{row.bandwidth_share:.0%}",
                ratio,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))


def _mixes(measurement: Measurement) -> Iterator[str]:
    for tokens in measurement.rounds:
        for mix, excess in mix_excess(measurement, tokens).items():
            yield (
                f"tokens {tokens}: the mix {mix} took {abs(excess):.1%} "
                f"{'more' if excess > 0 else 'less'} than the byte-weighted mean of its widths"
            )
