"""One expert at several widths: what each of them does to its layer's output, and to the loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moeq.checkpoint import MoELayer
from moeq.errors import MoeqError
from moeq.model import ExpertMatrices, LayerwiseModel, Routed
from moeq.rounding import QuantizedWeight, quantize_by_inputs
from vllm_moeq.format import PROJECTIONS, Projection


class Choice(NamedTuple):
    """A projection of an expert at a width."""

    container: str
    expert: int
    projection: Projection
    bits: int


class QuantizationError(NamedTuple):
    """What one projection of one expert at a lower width does, all else being original.

    Attributes:
        weight: Squared errors of its weights.
        output: Squared errors of the layer's output, as a sum over the calibration tokens.
        loss: Estimate of the increase of the model's divergence from itself, in nats per token:
            half of the squared products of output errors and gradients, see
            :mod:`moeq.sensitivity.fisher`.
    """

    weight: float
    output: float
    loss: float


class RoutingStatistics(NamedTuple):
    """What the router gives to an expert.

    Attributes:
        frequency: Share of the tokens.
        weight: Mean router weight of these tokens.
    """

    frequency: float
    weight: float


@dataclass(frozen=True, slots=True)
class MeasuredExpert:
    """One expert and what it gets: all on the device where the model runs.

    Attributes:
        model: Runs it.
        layer: Where it is.
        expert: Its number.
        original: Its weights.
        x: float32 [n, hidden_size].
        weights: Router weights [n, 1].
        gradient: Of the loss with respect to the layer's output [n, hidden_size].
        tokens: Of the calibration text.
    """

    model: LayerwiseModel
    layer: MoELayer
    expert: int
    original: ExpertMatrices
    x: torch.Tensor
    weights: torch.Tensor
    gradient: torch.Tensor
    tokens: int

    @classmethod
    def of(
        cls,
        model: LayerwiseModel,
        layer: MoELayer,
        expert: int,
        routed: Routed,
        gradient: torch.Tensor,
    ) -> "MeasuredExpert":
        """Read an expert and pick what it gets; ``gradient`` is of all tokens."""
        places, weights = routed.of_expert(expert)
        x, weights, local = (
            part.to(model.device) for part in (routed.x[places], weights, gradient[places])
        )
        matrices = model.matrices(layer, expert)
        return cls(model, layer, expert, matrices, x, weights, local, len(routed.x))

    def routing_statistics(self) -> RoutingStatistics:
        """Return what the router gives to it."""
        mean = float(self.weights.mean()) if len(self.weights) else 0.0
        return RoutingStatistics(len(self.weights) / self.tokens, mean)

    def rounded(
        self, widths: list[int], group_size: int, method: str
    ) -> Iterator[tuple[Choice, dict[str, torch.Tensor], QuantizationError]]:
        """Yield each projection at each width: its packed tensors, and what it alone does.

        Raises:
            MoeqError: A weight cannot be quantized; names it.
        """
        original = self.original
        hidden = self.model.expert_hidden(original, self.x)
        expected = hidden @ original.w2.T  # a bias of w2 does not change
        matrices = {"w13": original.w13, "w2": original.w2}
        inputs = {"w13": self.x, "w2": hidden}
        quantized = {
            projection: self._quantize(
                projection, matrices[projection], inputs[projection], widths, group_size, method
            )
            for projection in PROJECTIONS
        }
        for bits in widths:
            for projection in PROJECTIONS:
                weight, names = quantized[projection][bits], self.layer.projections[projection]
                tensors: dict[str, torch.Tensor] = {}
                for name, part in zip(names, weight.parts(len(names)), strict=True):
                    tensors |= part.named(self.layer.tensor_name(self.expert, name))
                matrix = weight.dequantize(bits, group_size)
                if projection == "w13":
                    changed = original._replace(w13=matrix)
                    output = self.model.expert_hidden(changed, self.x) @ original.w2.T
                else:
                    output = hidden @ matrix.T
                difference = (output - expected) * self.weights
                increase = (difference * self.gradient).sum(-1)
                error = QuantizationError(
                    weight=float((matrix - matrices[projection]).square().sum()),
                    output=float(difference.square().sum()),
                    loss=float(increase.square().sum()) / 2 / self.tokens,
                )
                yield Choice(self.layer.container, self.expert, projection, bits), tensors, error

    def _quantize(
        self,
        projection: Projection,
        matrix: torch.Tensor,
        x: torch.Tensor,
        widths: list[int],
        group_size: int,
        method: str,
    ) -> dict[int, QuantizedWeight]:
        try:
            rounded = quantize_by_inputs(
                [matrix], [x], [self.weights], widths, group_size, method=method
            )
        except ValueError as error:
            name = self.layer.tensor_name(self.expert, self.layer.projections[projection][0])
            folder = self.model.source.folder
            raise MoeqError(f"{folder}: cannot quantize {name}: {error}") from error
        return {bits: weight for bits, (weight,) in rounded.items()}
