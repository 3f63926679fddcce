"""What running and rounding experts takes: estimates that can be told before it runs."""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moeq.checkpoint import MoELayer, SourceModel
from moeq.checkpoint.linear import LinearGroup
from moeq.checkpoint.servable import text_config
from moeq.errors import MoeqError
from moeq.rounding import REFINEMENT, Hessian, block_size, gram, gram_block, quantize_gptq
from moeq.workers import on_devices
from moeq.workers.local import Shared, Work

_TOP_K = "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"
"""Names of the number of experts that get each token."""
_COPIES = 7.5
"""float32 copies of a matrix while it is rounded: among them its transpose, columns sorted."""
_REACHED = 0.75
"""Share of the speed that is measured here that all the work reaches together."""
_TOGETHER = 2**30
"""Bytes that rounding experts beside each other may take, beside their inputs."""


class Cost(NamedTuple):
    """What work will take beyond Python and torch themselves.

    Attributes:
        operations: Floating-point operations, about.
        alone: Of them, those that workers do not share.
        steps: Columns that GPTQ and its refinement visit one after another, whatever their length.
        memory_bytes: Peak of the memory in use.
        worker_bytes: Peak of it for running and rounding an expert, or a batch of them.
        disk_bytes: Of temporary files, which go at the end.
        at_once: Experts that are worked on beside each other, on a device.
        items: Experts of a layer, or batches of them, which workers share.
        sizes: hidden_size and intermediate_size of an expert.
    """

    operations: float
    alone: float
    steps: float
    memory_bytes: int
    worker_bytes: int
    disk_bytes: int
    at_once: int
    items: int
    sizes: tuple[int, int]

    def seconds(self, device: torch.device, workers: int | None = None) -> float:
        """Estimate the time from how fast the device is right now.

        Args:
            device: Which.
            workers: That share the experts of a layer, all as fast as here; None for those of the
                device, which work on as many experts as are worked on beside each other.
        """
        speed = _measured_speed(str(device), self.at_once, self.sizes)
        turns = -(-self.items // (workers or self.at_once))
        shared = turns / -(-self.items // self.at_once)
        operations = self.alone + shared * (self.operations - self.alone)
        return operations / speed.operations_per_second + shared * self.steps * speed.step_seconds


class _Speed(NamedTuple):
    operations_per_second: float
    step_seconds: float


_MATRIX, _COLUMNS, _TOKENS = 1024, 128, 512
_SECONDS = 0.3
"""For which each of two kinds of work is timed: long enough to feel what else the device does."""


@cache
def _measured_speed(name: str, at_once: int, sizes: tuple[int, int]) -> _Speed:
    """Time what a device does most, and GPTQ on a matrix so small that only its steps count.

    That is experts on a CPU, beside each other as they will be, of the sizes given or smaller
    ones; products of square matrices elsewhere.
    """
    device = torch.device(name)
    generator = torch.Generator().manual_seed(0)
    workers, count = on_devices([device], at_once), 4 * at_once

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(device)

    def mean_time(work: Work[Shared, int, None], shared: Shared) -> float:
        """Return the seconds for each time that work is done."""
        list(workers.flat_map(work, shared, range(count)))  # compiles, allocates
        done, start, passed = 0, time.perf_counter(), 0.0
        while passed < _SECONDS:
            list(workers.flat_map(work, shared, range(count)))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done, passed = done + count, time.perf_counter() - start
        return passed / done

    if device.type == "cpu":
        hidden, inner = (min(size, _MATRIX) for size in sizes)
        expert = random(_TOKENS, hidden), random(2 * inner, hidden), random(hidden, inner)
        operations = _TOKENS * (6 * hidden * inner + _hessian(hidden) + _hessian(inner))
        seconds = mean_time(_run, expert)
    else:
        operations = 2 * _MATRIX**3
        seconds = mean_time(_multiply, random(_MATRIX, _MATRIX))
    small = random(1, 16, _COLUMNS)
    step = mean_time(_round, (small, Hessian.of(small.mT @ small, [16])))
    return _Speed(_REACHED * operations / seconds, step / (_COLUMNS * REFINEMENT.visits))


def _run(
    device: torch.device, expert: tuple[torch.Tensor, torch.Tensor, torch.Tensor], turn: int
) -> Iterator[None]:
    """Do what is done to an expert of w13 and w2 for each of its tokens [n, hidden_size]."""
    x, w13, w2 = expert
    gate, up = F.linear(x, w13).chunk(2, -1)
    hidden = F.silu(gate) * up
    F.linear(hidden, w2)
    gram(x)
    gram(hidden)
    yield


def _multiply(device: torch.device, square: torch.Tensor, turn: int) -> Iterator[None]:
    square @ square
    yield


def _round(
    device: torch.device, problem: tuple[torch.Tensor, Hessian], turn: int
) -> Iterator[None]:
    weights, hessian = problem
    quantize_gptq(weights, hessian, 2, weights.shape[-1])
    yield


def at_once(layers: Sequence[MoELayer], device: torch.device) -> int:
    """Return how many experts a device works on beside each other.

    Several cores share the work on small matrices badly: on a CPU, each expert gets a share of the
    cores, down to a single one, as long as all that are worked on take little memory.
    """
    if device.type != "cpu":
        return 1
    cores, experts = torch.get_num_threads(), max(layer.num_experts for layer in layers)
    each = max(working_bytes(layer) for layer in layers)
    most = max(1, min(cores, experts, _TOGETHER // each))
    return cores // -(-cores // most)  # shares are equal: fewer experts may leave fewer cores idle


def working_bytes(layer: MoELayer) -> int:
    """Return about how much memory rounding one expert takes, without its inputs."""
    most = max(_working(rows, columns) for rows, columns in _matrices(layer))
    return round(4 * (layer.expert_weights + most))


def experts_of_a_token(source: SourceModel, layer: MoELayer) -> int:
    """Return how many experts of a layer get each token: all, if ``config.json`` does not say.

    Raises:
        MoeqError: It says something that is no number of experts.
    """
    if layer.family.top_k:
        return layer.family.top_k
    config = text_config(source.reader.config)
    stated = {name: config[name] for name in _TOP_K if name in config}
    if not stated:
        return layer.num_experts
    for value in stated.values():
        numbers = value if isinstance(value, list) else [value]  # one for each layer
        if numbers and all(isinstance(number, int) for number in numbers) and max(numbers) > 0:
            return int(max(numbers))
    name, value = next(iter(stated.items()))
    raise MoeqError(f"{source.folder}: config.json has {name} {value!r}, no number of experts")


def tokens_of_experts(count: int, top_k: int, num_experts: int) -> float:
    """Return what so many experts get together if all tokens choose one, and any the others.

    As a multiple of all tokens; each expert gets a token once at most.
    """
    return 1 + (count - 1) * (top_k - 1) / max(1, num_experts - 1)


def gptq_operations(layers: list[MoELayer], widths: int = 1) -> float:
    """Return about how many floating-point operations GPTQ takes, without its Hessians.

    Args:
        layers: All of whose experts are rounded.
        widths: How often each; their Hessians are factored once.
    """
    total = 0.0
    for layer in layers:
        for rows, columns in _matrices(layer):
            total += layer.num_experts * _rounding(rows, columns, widths)
    return total


def linear_operations(groups: Iterable[LinearGroup], widths: int, tokens: int) -> float:
    """Return what rounding dense layers with GPTQ takes, with their Hessians.

    Args:
        groups: Those that have the same inputs.
        widths: How often each.
        tokens: That they get.
    """
    return sum(
        _rounding(group.rows, group.columns, widths) + tokens * _hessian(group.columns)
        for group in groups
        if not group.looks_up
    )


def linear_working_bytes(groups: Iterable[LinearGroup]) -> int:
    """Return about how much memory rounding dense layers takes, those of a layer together."""
    sums: dict[int, int] = {}
    most = 0.0
    for group in groups:
        sums[group.layer] = sums.get(group.layer, 0) + group.columns**2
        most = max(most, _working(group.rows, group.columns))
    return round(4 * (max(sums.values(), default=0) + most))


def _rounding(rows: int, columns: int, widths: int) -> float:
    # Feedback touches half of the pairs of columns, each round of refinement all of them, and each
    # visit those within a block.
    block = min(block_size(columns), columns)
    each = rows * columns**2 * (1 + 2 * REFINEMENT.rounds)
    each += rows * columns * block * 2 * (REFINEMENT.visits - 1)
    return widths * each + 1 / 3 * columns**3


def _hessian(columns: int) -> int:
    # Little more than a half of it is computed.
    return columns * (columns + min(columns, gram_block(columns)))


def _working(rows: int, columns: int) -> float:
    # A Hessian and its factor, and three more such matrices while it is factored.
    return max(5 * columns**2, 2 * columns**2 + _COPIES * rows * columns)


def gptq_steps(layer: MoELayer) -> int:
    """Return the columns that GPTQ visits one after another for an expert, or a batch of them."""
    return REFINEMENT.visits * (layer.hidden_size + layer.intermediate_size)


def hessian_operations(layer: MoELayer) -> int:
    """Return the floating-point operations that a token adds to the Hessians of an expert."""
    return sum(_hessian(columns) for _, columns in _matrices(layer))


def fit_operations(layer: MoELayer, samples: float) -> float:
    """Return what it takes to fit the down projection of an expert to so many wanted outputs."""
    rows, columns = layer.hidden_size, layer.intermediate_size
    product = 2 * samples * rows * columns
    if samples >= columns:
        return product + 4 * rows * columns**2
    return 2 * product + samples**2 * (columns + 2 * rows + samples / 3)


def forward_operations(layer: MoELayer) -> int:
    """Return the floating-point operations of an expert for a token."""
    return 2 * layer.expert_weights


def other_operations(source: SourceModel, length: int) -> tuple[float, float]:
    """Return what the rest of a model takes for a token of a sequence of so many: layers, head."""
    config = text_config(source.reader.config)
    head = 2.0 * source.hidden_size * config.get("vocab_size", 0)
    experts = sum(layer.num_experts * layer.expert_weights for layer in source.layers)
    tables = 1 if config.get("tie_word_embeddings") else 2
    weights = max(0.0, source.weights - experts - tables * head / 2)
    attention = 4 * length * source.hidden_size * (source.layers[-1].index + 1)
    return 2 * weights + attention, head


def _matrices(layer: MoELayer) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return rows and columns of the matrices of an expert that are rounded together."""
    return (
        (len(layer.projections["w13"]) * layer.intermediate_size, layer.hidden_size),
        (layer.hidden_size, layer.intermediate_size),
    )
