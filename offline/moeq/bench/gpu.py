"""Times one fused MoE layer on a GPU: CUDA graphs, interleaved, weights that no cache holds.

A *call* is one pass of a batch through the layer. A timed graph holds several calls, each with its
own tokens and routing, and takes turns among copies of the weights, as the layers of a model do.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median, quantiles

import torch
import torch.nn.functional as F

from moeq.bench.contenders import ACTIVATION, expert_bytes, random_weights
from moeq.bench.settings import Shape, Widths
from vllm_moeq.format import PROJECTIONS, dequantize
from vllm_moeq.kernels import KERNELS, ExpertLayout, ExpertWeights, fused_experts

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens bfloat16 [M, hidden_size], router weights float32 and expert ids int32 [M, top_k]."""
RunCopy = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes which copy of the weights, and a call; returns bfloat16 [M, hidden_size]."""
Matrices = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Takes an expert; returns what its codes stand for in float64: w13 [2 * intermediate_size,
hidden_size], gate first, and w2 [hidden_size, intermediate_size]."""

DECODE_CALLS, PREFILL_CALLS, MOST_DECODE_TOKENS = 16, 4, 64
"""Calls of a graph, by the number of tokens."""
CPU_CALLS = 1
"""On a CPU nothing is measured: the code is tried out in Triton's interpreter."""
CHECKED_TOKENS = 64
"""So many are compared with float64."""
WARM_UPS = 2
_CACHE_TURNS = 4
"""The copies together are this many times the L2 cache."""
_COPY_BYTES, _COPY_RUNS = 1 << 30, 9


@dataclass(frozen=True, slots=True)
class GpuContender:
    """One layer, ready to run.

    Attributes:
        name: What the results call it.
        expert_bytes: Bytes of each expert's weights, with scales and zero points.
        copies: Copies of the weights.
        run: The layer.
        matrices: Its weights.
    """

    name: str
    expert_bytes: tuple[int, ...]
    copies: int
    run: RunCopy
    matrices: Matrices


@dataclass(frozen=True, slots=True)
class Figures:
    """What was found for one contender and one number of tokens.

    Attributes:
        us: Median microseconds of a call.
        us_iqr: Microseconds between the quartiles.
        read_bytes: Mean of what a call has to move: weights of the touched experts, activations.
        error: ‖output - float64‖ / ‖float64‖.
    """

    us: float
    us_iqr: float
    read_bytes: float
    error: float

    def floor_share(self, bandwidth: float) -> float:
        """Return the time that memory alone needs, at a number of bytes per second, over ours."""
        return self.read_bytes / bandwidth / (self.us * 1e-6)


def layout_of(shape: Shape, widths: Widths, group_size: int) -> ExpertLayout:
    """Lay out the experts of a shape at their widths."""
    bits = [widths.of(expert) for expert in range(shape.experts)]
    return ExpertLayout.build(
        w13_bits=bits,
        w2_bits=bits,
        group_size=group_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
    )


def prepared_copies(
    layout: ExpertLayout, weights: ExpertWeights, kernel: int, copies: int
) -> tuple[list[ExpertWeights], torch.Tensor]:
    """Prepare canonical weights for a kernel; return copies of them, and the layout as a tensor."""
    layout = replace(layout, kernel=kernel)
    first = KERNELS[kernel].prepare(weights, layout, ACTIVATION)
    others = [ExpertWeights(*(tensor.clone() for tensor in first)) for _ in range(copies - 1)]
    return [first, *others], layout.to_tensor()


def moeq_contender(
    name: str, shape: Shape, widths: Widths, group_size: int, kernel: int, device: torch.device
) -> GpuContender:
    """Make our layer with random weights on a device, for a kernel of the dispatch table."""
    layout = layout_of(shape, widths, group_size)
    weights = ExpertWeights(*(tensor.to(device) for tensor in random_weights(layout)))
    sizes = expert_bytes(layout)
    count = copies(sum(sizes), device)
    layers, tensor = prepared_copies(layout, weights, kernel, count)

    def run(copy: int, x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = fused_experts(
            x, router, ids, layers[copy], None, None, tensor, None, ACTIVATION, False
        )
        return result

    return GpuContender(name, sizes, count, run, matrices(layout, weights))


def matrices(layout: ExpertLayout, weights: ExpertWeights) -> Matrices:
    """Return what dequantizes one expert of canonical weights."""

    def of(slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        w13, w2 = (
            dequantize(
                packed[first : first + size].view(layout.shape(projection)[0], -1),
                scale[slot],
                zero_point[slot],
                layout.bits_and_offset(projection, slot)[0],
                layout.group_size,
                torch.float64,
            )
            for projection, (packed, scale, zero_point) in zip(
                PROJECTIONS, (weights[:3], weights[3:]), strict=True
            )
            for first, size in (layout.span(projection, slot),)
        )
        return w13, w2

    return of


def copies(layer_bytes: int, device: torch.device) -> int:
    """Return how many copies of a layer no L2 cache can hold."""
    cache = 0
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, -(-_CACHE_TURNS * cache // layer_bytes))


def draw_calls(
    shape: Shape, tokens: int, *, skewed: bool, generator: torch.Generator, device: torch.device
) -> list[Call]:
    """Draw the calls of a graph.

    Args:
        shape: Sizes of the layer.
        tokens: Tokens of each call.
        skewed: Experts are chosen in proportion to 1, 1/2, 1/3, ... instead of equally.
        generator: Of the CPU.
        device: Where the calls go.
    """
    popularity = torch.ones(shape.experts)
    if skewed:
        popularity = 1 / torch.arange(1, shape.experts + 1)
    count = DECODE_CALLS if tokens <= MOST_DECODE_TOKENS else PREFILL_CALLS
    calls = []
    for _ in range(count if device.type == "cuda" else CPU_CALLS):
        x = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
        ids = torch.multinomial(popularity.expand(tokens, -1), shape.top_k, generator=generator)
        router = torch.rand(tokens, shape.top_k, generator=generator).softmax(-1)
        calls.append((x.to(device), router.to(device), ids.int().to(device)))
    return calls


def moved_bytes(contender: GpuContender, shape: Shape, calls: Sequence[Call]) -> float:
    """Return the fewest bytes that a call moves, on average.

    Weights of the experts that the routing touches, once; tokens, outputs, and what the two
    products hand on, with both its writing and its reading.
    """
    weights = [sum(contender.expert_bytes[i] for i in _distinct(ids)) for _, _, ids in calls]
    tokens, top_k = calls[0][2].shape
    chosen, hidden, inner = tokens * top_k, shape.hidden_size, shape.intermediate_size
    # The rows of both products: 2 * inner and inner columns between them, hidden at the end.
    activations = 2 * (tokens * hidden + chosen * (2 * inner + inner + hidden))
    return sum(weights) / len(weights) + activations


def relative_error(contender: GpuContender, call: Call) -> float:
    """Run a call and compare its first tokens with float64."""
    output = contender.run(0, *call)[:CHECKED_TOKENS].double()
    x, router, ids = (tensor[:CHECKED_TOKENS] for tensor in call)
    expected = torch.zeros_like(output)
    for expert in _distinct(ids):
        w13, w2 = contender.matrices(expert)
        gate, up = F.linear(x.double(), w13).chunk(2, -1)
        share = (router.double() * (ids == expert)).sum(-1, keepdim=True)
        expected += share * F.linear(F.silu(gate) * up, w2)
    return float((output - expected).norm() / expected.norm())


@contextmanager
def replay(contender: GpuContender, calls: Sequence[Call]) -> Iterator[Callable[[], None]]:
    """Give what runs all calls: a CUDA graph on a GPU, else one call after another."""

    def run_all() -> None:
        for index, call in enumerate(calls):
            contender.run(index % contender.copies, *call)

    if calls[0][0].device.type != "cuda":
        yield run_all
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills caches that a graph must not fill
        run_all()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()
    yield graph.replay
    torch.cuda.synchronize()
    graph.reset()


def time_interleaved(
    replays: Sequence[Callable[[], None]], runs: int, device: torch.device
) -> list[list[float]]:
    """Return the seconds of each replay in each run.

    Each run starts with another one: none always follows the same state of the machine.
    """
    for _ in range(WARM_UPS if device.type == "cuda" else 0):
        for run in replays:
            run()
    seconds: list[list[float]] = [[] for _ in replays]
    for index in range(runs):
        order = [(index + turn) % len(replays) for turn in range(len(replays))]
        for place, elapsed in zip(order, _time([replays[i] for i in order], device), strict=True):
            seconds[place].append(elapsed)
    return seconds


def figures(seconds: Sequence[float], calls: int, read_bytes: float, error: float) -> Figures:
    """Judge one contender by the seconds of its replays, each of a number of calls."""
    lower, _, upper = quantiles(seconds, n=4, method="inclusive")
    scale = 1e6 / calls
    return Figures(median(seconds) * scale, (upper - lower) * scale, read_bytes, error)


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes per second, read plus written, of copying a gibibyte of device memory.

    On a CPU, where nothing is measured, a small copy stands in.
    """
    size = _COPY_BYTES if device.type == "cuda" else 1 << 20
    source = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    (seconds,) = time_interleaved([copy], _COPY_RUNS, device)
    return 2 * size / median(seconds)


def _distinct(ids: torch.Tensor) -> set[int]:
    return set(ids.flatten().tolist())


def _time(replays: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
    if device.type != "cuda":
        times = []
        for run in replays:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times
    pairs = []
    for run in replays:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]
