"""What running and rounding experts takes: estimates that can be told before it runs."""

import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import torch

from moeq.checkpoint import MoELayer, SourceModel
from moeq.checkpoint.linear import LinearGroup
from moeq.checkpoint.servable import text_config
from moeq.rounding import GRAM_BLOCK, REFINEMENT, Hessian, block_size, quantize_gptq

_TOP_K = "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"
"""Names of the number of experts that get each token."""
_COPIES = 7.5
"""float32 copies of a matrix while it is rounded: among them its transpose, columns sorted."""
_REACHED = 0.75
"""Share of the speed of a product of square matrices that all the work reaches together."""


class Cost(NamedTuple):
    """What work will take beyond Python and torch themselves.

    Attributes:
        operations: Floating-point operations, about.
        steps: Columns that GPTQ and its refinement visit one after another, whatever their length.
        memory_bytes: Peak of the memory in use.
        worker_bytes: Peak of it for running and rounding an expert, or a batch of them.
        disk_bytes: Of temporary files, which go at the end.
    """

    operations: float
    steps: float
    memory_bytes: int
    worker_bytes: int
    disk_bytes: int

    def seconds(self, device: torch.device) -> float:
        """Estimate the time from how fast the device is right now."""
        speed = _measured_speed(str(device))
        return self.operations / speed.operations_per_second + self.steps * speed.step_seconds


class _Speed(NamedTuple):
    operations_per_second: float
    step_seconds: float


_MATRIX, _COLUMNS = 1024, 128
_SECONDS = 0.3
"""For which each of two kinds of work is timed: long enough to feel what else the device does."""


@cache
def _measured_speed(name: str) -> _Speed:
    """Time products of matrices, and GPTQ on a matrix so small that only its steps count."""
    device = torch.device(name)
    generator = torch.Generator().manual_seed(0)
    square = torch.rand(_MATRIX, _MATRIX, generator=generator).to(device)
    small = torch.rand(1, 16, _COLUMNS, generator=generator).to(device)
    hessian = Hessian.of(small.mT @ small, [16])

    def mean_time(work: Callable[[], object]) -> float:
        work()  # compiles, allocates
        count, start, passed = 0, time.perf_counter(), 0.0
        while passed < _SECONDS:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            count, passed = count + 1, time.perf_counter() - start
        return passed / count

    product = mean_time(lambda: square @ square)
    step = mean_time(lambda: quantize_gptq(small, hessian, 2, _COLUMNS))
    return _Speed(_REACHED * 2 * _MATRIX**3 / product, step / (_COLUMNS * REFINEMENT.visits))


def working_bytes(layer: MoELayer) -> int:
    """Return about how much memory rounding one expert takes, without its inputs."""
    most = max(_working(rows, columns) for rows, columns in _matrices(layer))
    return round(4 * (layer.expert_weights + most))


def experts_of_a_token(source: SourceModel, layer: MoELayer) -> int:
    """Return how many experts of a layer get each token."""
    config = text_config(source.reader.config)
    stated = (config[name] for name in _TOP_K if name in config)
    top_k = layer.family.top_k or next(stated, layer.num_experts)
    return int(max(top_k) if isinstance(top_k, list) else top_k)  # one for each layer


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
    return columns * (columns + min(columns, GRAM_BLOCK))


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
        return product + 2 * rows * columns**2
    return product + samples**2 * (columns + 2 * rows + samples / 3)


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
