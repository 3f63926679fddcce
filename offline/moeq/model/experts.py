"""The experts of a layer: where their weights come from, and what they add to the hidden states."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moeq.checkpoint.families import Matrix, MoELayer
from moeq.checkpoint.reader import CheckpointReader
from moeq.model.layerwise import ExpertMatrices, LayerwiseModel, Routed
from moeq.rounding import QuantizedWeight
from vllm_moeq.format import BitPlan


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """Where a model's experts come from.

    Attributes:
        matrices: Takes a layer and an expert's number; returns its weights.
        key: Takes the same; sources with equal keys give equal weights, which are then read once.
    """

    matrices: Callable[[MoELayer, int], ExpertMatrices]
    key: Callable[[MoELayer, int], Hashable]

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
) -> Routed | None:
    """Run one layer in place, with its experts.

    Args:
        model: All but the experts.
        index: Which layer.
        hidden: float32 [sources * n, L, hidden_size]: n sequences for each source of experts.
        x: Memory of the same shape.
        sources: Sets of experts.

    Returns:
        What the experts got; None for a layer without experts.
    """
    routed = model.run(index, hidden, x)
    if routed is not None:
        add_experts(model, model.moe_layers[index], routed, hidden, sources)
    return routed


def add_experts(
    model: LayerwiseModel,
    layer: MoELayer,
    routed: Routed,
    hidden: torch.Tensor,
    sources: Sequence[ExpertSource],
) -> None:
    """Add, in place, what the experts of a layer give.

    Args:
        model: Runs them.
        layer: Where they are.
        routed: What they get.
        hidden: float32 [sources * n, L, hidden_size]: n sequences for each source of experts.
        sources: Sets of experts.
    """
    flat = hidden.view(-1, hidden.shape[-1])
    for expert in range(layer.num_experts):
        places, weights = routed.of_expert(expert)
        w13_bias, w2_bias = model.biases(layer, expert)  # whatever the widths of the weights
        streams = places // (len(flat) // len(sources))
        for part, matrices in _weights(sources, layer, expert, streams):
            inputs = routed.x[places[part]].to(model.device)
            matrices = matrices._replace(w13_bias=w13_bias, w2_bias=w2_bias)
            result = model.expert_output(matrices, inputs).to(flat.device) * weights[part]
            flat.index_add_(0, places[part], result)


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
