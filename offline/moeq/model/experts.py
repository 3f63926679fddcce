"""Where weights of experts and dense layers come from; what experts add to hidden states."""

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from moeq.checkpoint.families import Matrix, MoELayer
from moeq.checkpoint.reader import CheckpointReader
from moeq.model.device import local_workers
from moeq.model.layerwise import LayerwiseModel
from moeq.model.stand_ins import Routed
from moeq.model.stored import NO_WEIGHTS, ExpertMatrices, Weights
from moeq.rounding import QuantizedWeight
from moeq.workers import Workers
from vllm_moeq.format import BitPlan


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """Where a model's experts come from.

    Attributes:
        matrices: Takes a layer and an expert's number; returns its weights.
        key: Takes the same; sources with equal keys give equal weights, which are then read once.
        linear: What sources with the same dense layers have in common; None if those are the
            checkpoint's.
        linear_weights: Returns those of one decoder layer that are not, float32, by names.
    """

    matrices: Callable[[MoELayer, int], ExpertMatrices]
    key: Callable[[MoELayer, int], Hashable]
    linear: Hashable = None
    linear_weights: Callable[[int], Weights] = lambda index: NO_WEIGHTS

    @classmethod
    def original(cls, model: LayerwiseModel) -> "ExpertSource":
        """Return the experts of the checkpoint itself."""
        return cls(model.matrices, lambda layer, expert: None)

    @classmethod
    def packed(
        cls, reader: CheckpointReader, plan: BitPlan, device: torch.device
    ) -> "ExpertSource":
        """Return the experts of a packed checkpoint."""

        def matrices(layer: MoELayer, expert: int) -> ExpertMatrices:
            bits = plan.expert_bits[layer.container]
            widths = bits.w13[expert], bits.w2[expert]
            return dequantized(
                layer, expert, widths, plan.group_size, lambda name, width: reader.tensor(name),
                device,
            )  # fmt: skip

        return cls(matrices, lambda layer, expert: "packed")


def dequantized(
    layer: MoELayer,
    expert: int,
    widths: tuple[int, int],
    group_size: int,
    read: Callable[[str, int], torch.Tensor],
    device: torch.device,
) -> ExpertMatrices:
    """Return the weights of an expert that is stored packed, without its biases.

    Args:
        layer: Where it is.
        expert: Its number.
        widths: Of w13 and w2.
        group_size: Weights that share a scale.
        read: Takes the name of a packed tensor and its width; returns it.
        device: Where the weights are to be.
    """

    def weight(matrix: Matrix, width: int) -> torch.Tensor:
        names = QuantizedWeight.names(layer.tensor_name(expert, matrix))
        stored = (read(name, width).to(device) for name in names)
        return QuantizedWeight(*stored).dequantize(width, group_size)

    w13, w2 = (
        torch.cat([weight(matrix, width) for matrix in matrices])
        for matrices, width in zip(layer.projections.values(), widths, strict=True)
    )
    return ExpertMatrices(w13, w2)


def run_layer(
    model: LayerwiseModel,
    index: int,
    hidden: torch.Tensor,
    x: torch.Tensor,
    sources: Sequence[ExpertSource],
    sums: torch.Tensor | None = None,
    workers: Workers | None = None,
) -> Routed | None:
    """Run one layer in place, with its experts.

    Args:
        model: All but the experts.
        index: Which layer.
        hidden: float32 [sources * n, L, hidden_size]: n sequences for each source of experts.
        x: Buffer of the same shape.
        sources: Sets of experts.
        sums: Likewise, for what the experts' shares are added to; not needed where the model adds
            up.
        workers: Run the experts; by default the model's device does.

    Returns:
        What the experts got; None for a layer without experts.
    """
    if model.adds_up:
        sums = hidden
    elif sums is None:
        sums = torch.empty_like(hidden)
    parts: list[tuple[slice, Weights]] = []
    routings: list[Routed] = []
    for part, weights in _dense_layers(sources, index, len(hidden) // len(sources)):
        routed = model.run_without_experts(index, hidden[part], x[part], sums[part], weights)
        if routed is not None:
            parts.append((part, weights))
            routings.append(routed)
    if not routings:
        return None
    together = Routed(
        x.view(-1, x.shape[-1]),
        torch.cat([routed.ids for routed in routings]),
        torch.cat([routed.weights for routed in routings]),
    )
    flat = sums.view(-1, sums.shape[-1])
    for places, share in expert_shares(model, model.moe_layers[index], together, sources, workers):
        flat.index_add_(0, places, share)
    for part, weights in parts:
        model.finish(index, hidden[part], sums[part], weights)
    return together


def _dense_layers(
    sources: Sequence[ExpertSource], index: int, count: int
) -> Iterator[tuple[slice, Weights]]:
    """Yield the dense layers of sources: those of neighbours that share them are run together.

    Args:
        sources: Sets of experts.
        index: Which layer.
        count: Sequences for each source.

    Yields:
        Places of the sequences among those for all sources, and the weights that they run with.
    """
    first = 0
    for _, neighbours in groupby(sources, key=lambda source: source.linear):
        alike = list(neighbours)
        last = first + len(alike) * count
        yield slice(first, last), alike[0].linear_weights(index)
        first = last


def expert_shares(
    model: LayerwiseModel,
    layer: MoELayer,
    routed: Routed,
    sources: Sequence[ExpertSource],
    workers: Workers | None = None,
) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield what a layer's experts add, expert by expert.

    Args:
        model: Runs them.
        layer: Where they are.
        routed: What they get: as many tokens for each source, one source after another.
        sources: Sets of experts.
        workers: Run the experts; by default the model's device does.

    Yields:
        Places [n] of an expert's tokens, and what it adds there [n, hidden_size]; nothing for an
        expert without tokens.
    """
    task = _Experts(model, layer, routed, sources, len(routed.x) // len(sources))
    workers = workers or local_workers(model.source.layers, model.device)
    yield from workers.flat_map(_shares, task, range(layer.num_experts))


class _Experts(NamedTuple):
    """Experts that are to run.

    Attributes:
        model: Runs them.
        layer: Where they are.
        routed: What they get.
        sources: Sets of them.
        tokens: That each set gets.
    """

    model: LayerwiseModel
    layer: MoELayer
    routed: Routed
    sources: Sequence[ExpertSource]
    tokens: int


def _shares(
    device: torch.device, task: _Experts, expert: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield places [n] of an expert's tokens, and what it adds there [n, hidden_size]."""
    model, routed = task.model.on(device), task.routed
    places, weights = routed.of_expert(expert)
    w13_bias, w2_bias = model.biases(task.layer, expert)  # whatever the widths of the weights
    for part, matrices in _weights(task.sources, task.layer, expert, places // task.tokens):
        w13, w2 = matrices.w13.to(device), matrices.w2.to(device)
        inputs = routed.x[places[part]].to(device)
        output = model.expert_output(ExpertMatrices(w13, w2, w13_bias, w2_bias), inputs)
        yield places[part], output.to(routed.x.device) * weights[part]


def _weights(
    sources: Sequence[ExpertSource], layer: MoELayer, expert: int, stream: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ExpertMatrices]]:
    """Yield an expert's different weights, and which of its tokens get them.

    Args:
        sources: Sets of experts.
        layer: Where the expert is.
        expert: Its number.
        stream: int64 [n]: for each of its tokens, the number of the source.
    """
    alike: dict[Hashable, list[int]] = {}
    for number, source in enumerate(sources):
        alike.setdefault(source.key(layer, expert), []).append(number)
    for numbers in alike.values():
        part = torch.isin(stream, torch.tensor(numbers)).nonzero().flatten()
        if len(part):
            yield part, sources[numbers[0]].matrices(layer, expert)
