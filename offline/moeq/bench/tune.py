"""``moeq bench --tune``: finds the fastest tiles of the Triton kernel for a layer on this GPU.

For each number of tokens it starts from the built-in tiles and changes one or two fields at a time,
keeping what is faster. A candidate and the best one so far are timed in turn, after all candidates
were compiled in parallel.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from moeq.bench.compiling import CompilerPool, Kernel, collected
from moeq.bench.contenders import ACTIVATION, expert_bytes, random_weights
from moeq.bench.gpu import (
    Call,
    GpuContender,
    copies,
    draw_calls,
    layout_of,
    matrices,
    prepared_copies,
    relative_error,
    replay,
    time_interleaved,
)
from moeq.bench.settings import Settings, Shape, Widths
from moeq.errors import MoeqError
from vllm_moeq import envs
from vllm_moeq.kernels import ExpertWeights, FusedExpertsCall, select_kernel
from vllm_moeq.kernels.triton.tiles import Table, Tiles, choose_tiles

logger = logging.getLogger(__name__)

CHOICES: dict[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128),
    "block_n": (32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4, 5, 6),
    "group_m": (1, 4, 8, 16),
    "programs_per_sm": (1, 2, 4, 8),
}
"""What is tried for each field."""
TOGETHER = (
    ("block_m", "num_warps"),
    ("block_n", "num_warps"),
    ("block_m", "block_n"),
    ("num_stages",),
    ("group_m",),
    ("programs_per_sm",),
)
"""Fields that change together: more tokens pay only with more warps, and neither without."""
FASTER = 0.99
"""A candidate must take at most this share of the time of the best one: less is noise."""
LARGEST_ERROR = 2e-2
"""‖output - float64‖ / ‖float64‖ of a candidate that may be used."""
_SEED = 0


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was found for one layer.

    Attributes:
        table: The fastest tiles.
        speedups: For each number of tokens, time of the built-in tiles over that of these.
        tried: Candidates that were timed.
        skipped: Candidates that were not, by the reason.
    """

    table: Table
    speedups: dict[int, float]
    tried: int
    skipped: Counter[str]


class Layer:
    """One layer on a device, which runs with any tiles."""

    def __init__(self, shape: Shape, widths: Widths, group_size: int, device: torch.device) -> None:
        self.shape, self.device = shape, device
        layout = layout_of(shape, widths, group_size)
        weights = ExpertWeights(*(tensor.to(device) for tensor in random_weights(layout)))
        self._sizes = expert_bytes(layout)
        self._copies, self._layout = prepared_copies(
            layout, weights, select_kernel(device, "triton"), copies(sum(self._sizes), device)
        )
        self._matrices = matrices(layout, weights)
        self._seen: set[int] = set()

    def with_tiles(self, tiles: Tiles) -> GpuContender:
        """Return the layer with fixed tiles."""
        from vllm_moeq.kernels.triton import layer

        def run(copy: int, x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> Any:
            call = FusedExpertsCall.from_op(
                x, router, ids, self._copies[copy], None, None, self._layout, None, ACTIVATION,
                False,
            )  # fmt: skip
            return layer.run(call, tiles)

        return GpuContender("moeq", self._sizes, len(self._copies), run, self._matrices)

    def kernels(self, candidates: Iterable[Tiles], call: Call) -> set[Kernel]:
        """Return what is to be compiled before a call can run with any of these tiles."""
        with collected() as kernels:
            for tiles in candidates:
                with suppress(Exception):  # why_not will find out, and say so
                    self.with_tiles(tiles).run(0, *call)
        return kernels

    def spills(self) -> bool:
        """Say whether the code compiled since the last question keeps registers in memory."""
        from vllm_moeq.kernels.triton import gemm

        result = False
        for kernel in (gemm.w13_kernel, gemm.w2_kernel):
            # Where the interpreter runs the kernels, there is no code.
            for cached in getattr(kernel, "device_caches", {}).values():
                for code in cached[0].values():
                    if id(code) not in self._seen:
                        self._seen.add(id(code))
                        result |= bool(code.n_spills)
        return result


def tune_and_write(settings: Settings, seconds: float) -> str:
    """Tune for a layer, add the result to the file that the kernel reads, and describe it.

    Args:
        settings: The layer, and numbers of tokens.
        seconds: Time after which no more candidates are tried.

    Raises:
        MoeqError: There is no CUDA GPU that the kernel runs on, or the file is damaged.
    """
    from vllm_moeq.kernels.triton import tuned

    deadline = time.monotonic() + seconds
    if not torch.cuda.is_available():
        raise MoeqError("`tune` measures a CUDA GPU, and torch finds none here")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, shape = torch.cuda.get_device_name(device), settings.shape
    try:
        path = envs.tiles() or tuned.default_file(gpu)
        tables = tuned.read_tables(path, gpu) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        layer = Layer(shape, settings.bits[0], settings.group_size, device)
        tuning = tune(layer, settings, deadline)
    except (ValueError, OSError) as error:
        raise MoeqError(f"`tune`: {error}") from error
    key = tuned.shape_key(shape.hidden_size, shape.intermediate_size, shape.experts)
    tuned.write_tables(path, gpu, tables | {key: tuning.table})
    return "\n".join((*describe(shape, tuning), f"wrote {path}"))


@torch.no_grad()
def tune(layer: Layer, settings: Settings, deadline: float) -> Tuning:
    """Find the fastest tiles for each number of tokens.

    After ``deadline``, of ``time.monotonic``, nothing more is tried: sizes not reached by then keep
    the built-in tiles.
    """
    generator = torch.Generator().manual_seed(_SEED)
    rows: list[tuple[float, Tiles]] = []
    speedups: dict[int, float] = {}
    skipped: Counter[str] = Counter()
    refused: dict[Tiles, str] = {}
    tried = 0
    with CompilerPool() as pool:
        for tokens in tqdm(sorted(settings.tokens), desc="tune", unit="size", disable=None):
            choices, experts = tokens * layer.shape.top_k, layer.shape.experts
            calls = draw_calls(
                layer.shape, tokens, skewed=False, generator=generator, device=layer.device
            )
            best = choose_tiles(choices, experts)
            seen, speedup = {best}, 1.0
            # All that one step leads to at once; before a step what the steps before changed.
            first_steps = [tiles for names in TOGETHER for tiles in _changes(best, names)]
            pool.compile(layer.kernels(first_steps, calls[0]), deadline)
            for names in TOGETHER:
                candidates = [tiles for tiles in _changes(best, names) if tiles not in seen]
                pool.compile(layer.kernels(candidates, calls[0]), deadline)
                for candidate in candidates:
                    if time.monotonic() > deadline:
                        break
                    seen.add(candidate)
                    reason = refused.get(candidate) or why_not(layer, candidate, calls[0])
                    if reason:
                        refused[candidate] = reason
                        skipped[reason] += 1
                        continue
                    tried += 1
                    share = _share_of_time(layer, candidate, best, calls, settings.runs)
                    if share <= FASTER:
                        best, speedup = candidate, speedup / share
            rows.append((choices / experts, best))
            speedups[tokens] = speedup
    rows[-1] = (float("inf"), rows[-1][1])
    return Tuning(tuple(rows), speedups, tried, skipped)


def why_not(layer: Layer, tiles: Tiles, call: Call) -> str | None:
    """Return why tiles cannot be used, or None if they can."""
    try:
        error = relative_error(layer.with_tiles(tiles), call)
    except Exception as problem:  # whatever the compiler and the driver raise
        logger.info("%s: %s", tiles, problem)
        return "does not compile"
    if layer.spills():
        return "spills"
    # Not a number is no number below the limit.
    return None if error <= LARGEST_ERROR else "computes something else"


def describe(shape: Shape, tuning: Tuning) -> Iterator[str]:
    """Yield lines that show what was found."""
    skipped = ", ".join(f"{count} {reason}" for reason, count in tuning.skipped.items()) or "none"
    yield f"{shape.name}: {tuning.tried} candidates timed; skipped: {skipped}"
    for (_, tiles), (tokens, speedup) in zip(tuning.table, tuning.speedups.items(), strict=True):
        yield f"up to {tokens} tokens: {tiles}, {speedup:.2f} times as fast as the built-in tiles"


def _changes(tiles: Tiles, names: Sequence[str]) -> list[Tiles]:
    """Return the tiles with all values of these fields."""
    values = product(*(CHOICES[name] for name in names))
    return [replace(tiles, **dict(zip(names, chosen, strict=True))) for chosen in values]


def _share_of_time(
    layer: Layer, candidate: Tiles, best: Tiles, calls: list[Call], runs: int
) -> float:
    """Return the time of a candidate over that of the best one so far."""
    first, second = layer.with_tiles(candidate), layer.with_tiles(best)
    with replay(first, calls) as new, replay(second, calls) as old:
        new_times, old_times = time_interleaved([new, old], runs, layer.device)
    return median(a / b for a, b in zip(new_times, old_times, strict=True))
