"""Ways to round experts layer by layer that the product does not have, for beyond_gptq.py.

Quantized layers feed the next, as in ``moeq quantize --calib``; what differs is what the rounded
weights are fitted to.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from learned_rounding import LearnedExpert, learn_rounding

from moeq.calibration import FEWEST_TOKENS
from moeq.checkpoint import CheckpointReader
from moeq.families import Matrix, MoELayer
from moeq.layerwise import ExpertMatrices, LayerwiseModel, Routed
from moeq.rounding import QuantizedWeight, quantize_gptq, quantize_hqq
from vllm_moeq.format import BitPlan

RIDGE = 0.1
"""Cost of a change of fitted weights, relative to the mean square of their inputs."""

Stored = dict[str, QuantizedWeight]
Quantize = Callable[[torch.Tensor, torch.Tensor, int, int, int], QuantizedWeight]
"""Takes a matrix, the Hessian of its inputs, how many inputs, the width and the group size."""


class Target(Enum):
    """What the rounded matrices of an expert are fitted to; each includes the one before."""

    MATRIX = "each matrix to its own output, as the product does"
    EXPERT = "w2 to the output of the unrounded expert"
    STREAM = "to the outputs in the original model, where no layer is rounded"
    RESIDUAL = "w2 to what brings the residual stream to where it is in the original model"

    @property
    def needs_original(self) -> bool:
        """Whether the original model has to run beside the rounded one."""
        return self in (Target.STREAM, Target.RESIDUAL)


@dataclass(frozen=True, slots=True)
class Method:
    """How experts are rounded.

    Attributes:
        quantize: Rounds a matrix.
        target: What it is fitted to.
        ridge: See :data:`RIDGE`.
        learning_steps: Of learned rounding afterwards, against the output of the MoE block.
        recalibrate_routers: Whether routers are fitted to the original model's logits first.
    """

    quantize: Quantize = quantize_gptq
    target: Target = Target.MATRIX
    ridge: float = RIDGE
    learning_steps: int = 0
    recalibrate_routers: bool = False

    @property
    def needs_original(self) -> bool:
        """Whether the original model runs beside the rounded one."""
        return self.target.needs_original or self.recalibrate_routers


class Rounded(NamedTuple):
    """The result: packed weights and changed routers, by their names on disk."""

    weights: Stored
    routers: dict[str, torch.Tensor]


class _Stream:
    """The calibration text on its way through a model, one layer at a time."""

    def __init__(self, model: LayerwiseModel, tokens: torch.Tensor, hidden_size: int) -> None:
        self.hidden, self._x = torch.empty(2, *tokens.shape, hidden_size)
        self._model = model
        model.embed(tokens, self.hidden)

    def run(self, index: int) -> Routed | None:
        return self._model.run(index, self.hidden, self._x)

    def add(self, places: torch.Tensor, output: torch.Tensor) -> None:
        self.hidden.view(-1, self.hidden.shape[-1]).index_add_(0, places, output)


def round_experts(
    reader: CheckpointReader,
    layers: list[MoELayer],
    plan: BitPlan,
    tokens: torch.Tensor,
    method: Method,
) -> Rounded:
    """Round all experts of a checkpoint.

    Args:
        reader: The checkpoint.
        layers: Its MoE layers.
        plan: Their widths.
        tokens: int64 [n, L]: the calibration text.
        method: How.
    """
    model = LayerwiseModel(reader, layers, torch.device("cpu"))
    rounded = _Stream(model, tokens, layers[0].hidden_size)
    original = _Stream(model, tokens, layers[0].hidden_size) if method.needs_original else rounded
    result = Rounded({}, {})
    for index in range(len(model)):
        routed = rounded.run(index)
        reference = original.run(index) if original is not rounded else routed
        if routed is None or reference is None:
            continue
        layer = model.moe_layers[index]
        if method.recalibrate_routers:
            weight = fitted_router(reader.tensor(layer.router).float(), routed.x, reference.x)
            result.routers[layer.router] = weight
            routed = _rerouted(routed, weight)
        lag = (original.hidden - rounded.hidden).flatten(0, 1)
        work = _LayerRounding(model, layer, plan, method, routed, reference, lag)
        for stored, places, output in work.run():
            result.weights.update(stored)
            rounded.add(places, output)
        if original is not rounded:
            for places, output in _original_outputs(model, layer, reference):
                original.add(places, output)
    return result


def fitted(
    weight: torch.Tensor, x: torch.Tensor, wanted: torch.Tensor, ridge: float = RIDGE
) -> torch.Tensor:
    """Return the weights nearest to ``weight`` whose output on x comes nearest to a wanted one.

    Args:
        weight: float32 [N, K].
        x: float32 [n, K].
        wanted: float32 [n, N].
        ridge: Cost of a change of the weights, relative to the mean of x's squares.
    """
    hessian = x.T @ x
    hessian += ridge * hessian.diagonal().mean() * torch.eye(len(hessian))
    return weight + torch.linalg.solve(hessian, x.T @ (wanted - x @ weight.T)).T


def fitted_router(weight: torch.Tensor, x: torch.Tensor, original_x: torch.Tensor) -> torch.Tensor:
    """Return a router [E, K] whose logits on x are nearest to the old ones on ``original_x``."""
    return fitted(weight, x, original_x @ weight.T)


def _rerouted(routed: Routed, weight: torch.Tensor) -> Routed:
    """Route the same tokens with another router, in Mixtral's way."""
    probabilities = F.softmax(routed.x @ weight.T, dim=-1)
    weights, ids = probabilities.topk(routed.ids.shape[1], dim=-1)
    return Routed(routed.x, ids, weights / weights.sum(-1, keepdim=True))


def _original_outputs(
    model: LayerwiseModel, layer: MoELayer, routed: Routed
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the places of each expert's tokens, and what the unrounded expert gives for them."""
    for expert in range(layer.num_experts):
        places, weights = routed.of_expert(expert)
        gate, up, down = model.matrices(layer, expert)
        inner = model.expert_hidden(gate, up, routed.x[places])
        yield places, inner @ down.T * weights


@dataclass(slots=True)
class _LayerRounding:
    """Rounds the experts of one layer.

    Attributes:
        lag: What the residual stream lacks before the experts' share is added, [T, hidden_size].
    """

    model: LayerwiseModel
    layer: MoELayer
    plan: BitPlan
    method: Method
    routed: Routed
    reference: Routed
    lag: torch.Tensor

    def run(self) -> Iterator[tuple[Stored, torch.Tensor, torch.Tensor]]:
        """Yield for each expert its packed weights, the places of its tokens and its output."""
        bits = self.plan.expert_bits[self.layer.container]
        rounded = [self._round_expert(expert) for expert in range(self.layer.num_experts)]
        if self.method.learning_steps:
            experts = [
                LearnedExpert.of(
                    self.model.matrices(self.layer, expert), weights,
                    (bits.width("w13", expert), bits.width("w2", expert)),
                )
                for expert, weights in enumerate(rounded)
            ]  # fmt: skip
            learn_rounding(
                experts, self.model.expert_hidden, self.routed, self._block_output(),
                self.method.learning_steps,
            )  # fmt: skip
            rounded = [expert.stored() for expert in experts]
        for expert, (gate, up, down) in enumerate(rounded):
            places, weights = self.routed.of_expert(expert)
            width = bits.width("w13", expert)
            inner = self.model.expert_hidden(
                gate.dequantize(width), up.dequantize(width), self.routed.x[places]
            )
            output = inner @ down.dequantize(bits.width("w2", expert)).T * weights
            names: tuple[Matrix, ...] = ("gate", "up", "down")
            stored = {
                self.layer.tensor_name(expert, name): weight
                for name, weight in zip(names, (gate, up, down), strict=True)
            }
            yield stored, places, output

    def _block_output(self) -> torch.Tensor:
        """Return what the unrounded experts give for the tokens as they are routed, [T, H]."""
        output = torch.zeros_like(self.routed.x)
        for places, part in _original_outputs(self.model, self.layer, self.routed):
            output.index_add_(0, places, part)
        return output

    def _round_expert(self, expert: int) -> tuple[QuantizedWeight, ...]:
        bits = self.plan.expert_bits[self.layer.container]
        places, router_weights = self.routed.of_expert(expert)
        x, original = self.routed.x[places], self.model.matrices(self.layer, expert)
        original_x = self.reference.x[places]
        w13 = torch.cat((original.gate, original.up))
        wanted = original_x @ w13.T if self.method.target.needs_original else None
        packed = self._round(w13, x, router_weights, bits.width("w13", expert), wanted)
        gate_up = [
            QuantizedWeight(*parts)
            for parts in zip(*(tensor.chunk(2) for tensor in packed), strict=True)
        ]
        rounded_gate, rounded_up = packed.dequantize(bits.width("w13", expert)).chunk(2)
        inner = self.model.expert_hidden(rounded_gate, rounded_up, x)
        wanted = None
        if self.method.target is not Target.MATRIX:
            wanted = self._expert_output(original, original_x)
        if self.method.target is Target.RESIDUAL:
            wanted += self.lag[places]  # in full: an expert's tokens have weights that sum to one
        down = self._round(original.down, inner, router_weights, bits.width("w2", expert), wanted)
        return *gate_up, down

    def _expert_output(self, original: ExpertMatrices, x: torch.Tensor) -> torch.Tensor:
        return self.model.expert_hidden(original.gate, original.up, x) @ original.down.T

    def _round(
        self,
        weight: torch.Tensor,
        x: torch.Tensor,
        router_weights: torch.Tensor,
        bits: int,
        wanted: torch.Tensor | None,
    ) -> QuantizedWeight:
        """Round a matrix as the product does, after moving it to a wanted output if there is."""
        group_size = self.plan.group_size
        if len(x) < FEWEST_TOKENS:
            return quantize_hqq(weight, bits, group_size)
        weighted = x * router_weights
        if wanted is not None:
            weight = fitted(weight, weighted, wanted * router_weights, self.method.ridge)
        return self.method.quantize(weight, weighted.T @ weighted, len(x), bits, group_size)
