"""Ways to round experts layer by layer, for beyond_gptq.py: the product's, and others.

Quantized layers feed the next, as in ``moeq quantize --calib``; what differs is what the rounded
weights are fitted to.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from learned_rounding import LearnedExpert, learn_rounding
from moeq.calibration.calibration import FEWEST_TOKENS

from moeq.checkpoint.families import Matrix, MoELayer
from moeq.checkpoint.reader import CheckpointReader
from moeq.model.layerwise import ExpertMatrices, LayerwiseModel, Routed
from moeq.rounding import Hessian, QuantizedWeight, fitted, quantize_gptq, quantize_hqq
from vllm_moeq.format import BitPlan

Stored = dict[str, QuantizedWeight]
ThreeWeights = tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]
"""Gate, up and down of an expert."""
Quantize = Callable[[torch.Tensor, Hessian, int, int], list[QuantizedWeight]]
"""Takes matrices [B, N, K], the curvature of their inputs, the width and the group size."""


class Target(Enum):
    """What the rounded matrices of an expert are fitted to."""

    MATRIX = "each matrix to its own output, as GPTQ does"
    EXPERT = "w2 to the output of the unrounded expert"
    STREAM = "each matrix to its output in the original model, where no layer is rounded"
    RESIDUAL = "w2 to what brings the residual stream back to the original model's: the product"

    @property
    def needs_original(self) -> bool:
        """Whether the original model has to run beside the rounded one."""
        return self in (Target.STREAM, Target.RESIDUAL)


@dataclass(frozen=True, slots=True)
class Method:
    """How experts are rounded.

    Attributes:
        quantize: Rounds matrices.
        target: What it is fitted to.
        learning_steps: Of learned rounding afterwards, against the output of the MoE block.
        recalibrate_routers: Whether routers are fitted to the original model's logits first.
    """

    quantize: Quantize = quantize_gptq
    target: Target = Target.MATRIX
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
        reference = original.run(index) if original is not rounded else None
        if reference is not None:
            for places, output in _original_outputs(model, model.moe_layers[index], reference):
                original.add(places, output)
        routed = rounded.run(index)
        if routed is None:
            continue
        layer = model.moe_layers[index]
        reference = reference or routed
        if method.recalibrate_routers:
            weight = fitted_router(reader.tensor(layer.router).float(), routed.x, reference.x)
            result.routers[layer.router] = weight
            routed = _rerouted(routed, weight)
        lag = None
        if method.target is Target.RESIDUAL:
            lag = (original.hidden - rounded.hidden).flatten(0, 1)
            for places, output in _original_outputs(model, layer, routed):
                lag.index_add_(0, places, output, alpha=-1)
            lag /= routed.weights.sum(1, keepdim=True)
        work = _LayerRounding(model, layer, plan, method, routed, reference, lag)
        for stored, places, output in work.run():
            result.weights.update(stored)
            rounded.add(places, output)
    return result


def fitted_router(weight: torch.Tensor, x: torch.Tensor, original_x: torch.Tensor) -> torch.Tensor:
    """Return a router [E, K] whose logits on x are nearest to the old ones on ``original_x``."""
    curvature = Hessian.of((x.T @ x)[None], [len(x)])
    missing = weight @ (original_x - x).T @ x
    return fitted(weight[None], curvature, missing[None])[0]


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
        output = model.expert_output(model.matrices(layer, expert), routed.x[places])
        yield places, output * weights


@dataclass(slots=True)
class _LayerRounding:
    """Rounds the experts of one layer.

    Attributes:
        lag: What the residual stream would lack if this layer were not rounded, divided by the
            sum of a token's router weights, [T, hidden_size]; None if nothing makes up for it.
    """

    model: LayerwiseModel
    layer: MoELayer
    plan: BitPlan
    method: Method
    routed: Routed
    reference: Routed
    lag: torch.Tensor | None

    def run(self) -> Iterator[tuple[Stored, torch.Tensor, torch.Tensor]]:
        """Yield for each expert its packed weights, the places of its tokens and its output."""
        rounded: dict[int, ThreeWeights] = {}
        for experts in self._alike():
            rounded.update(zip(experts, self._round_experts(experts), strict=True))
        if self.method.learning_steps:
            rounded = self._learned(rounded)
        for expert, (gate, up, down) in rounded.items():
            places, weights = self.routed.of_expert(expert)
            w13, w2 = self._widths(expert)
            matrices = ExpertMatrices(gate.dequantize(w13), up.dequantize(w13), down.dequantize(w2))
            names: tuple[Matrix, ...] = ("gate", "up", "down")
            stored = {
                self.layer.tensor_name(expert, name): weight
                for name, weight in zip(names, (gate, up, down), strict=True)
            }
            output = self.model.expert_output(matrices, self.routed.x[places]) * weights
            yield stored, places, output

    def _widths(self, expert: int) -> tuple[int, int]:
        bits = self.plan.expert_bits[self.layer.container]
        return bits.width("w13", expert), bits.width("w2", expert)

    def _alike(self) -> Iterable[list[int]]:
        """Group experts that can be rounded at once, as the product does."""
        alike: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
        for expert in range(self.layer.num_experts):
            enough = len(self.routed.of_expert(expert)[0]) >= FEWEST_TOKENS
            alike[*self._widths(expert), enough].append(expert)
        return alike.values()

    def _round_experts(self, experts: list[int]) -> list[ThreeWeights]:
        w13, w2 = self._widths(experts[0])
        originals = [self.model.matrices(self.layer, expert) for expert in experts]
        shares = [self.routed.of_expert(expert) for expert in experts]
        inputs = [self.routed.x[places] for places, _ in shares]
        router_weights = [weights for _, weights in shares]
        original_inputs = [self.reference.x[places] for places, _ in shares]
        matrices = [torch.cat((original.gate, original.up)) for original in originals]
        wanted = None
        if self.method.target is Target.STREAM:
            wanted = [x @ m.T for x, m in zip(original_inputs, matrices, strict=True)]
        gates_and_ups = self._round(matrices, inputs, router_weights, w13, wanted)
        inner = [
            self.model.expert_hidden(*weight.dequantize(w13).chunk(2), x)
            for weight, x in zip(gates_and_ups, inputs, strict=True)
        ]
        wanted = None
        if self.method.target is not Target.MATRIX:
            of_stream = self.method.target is Target.STREAM
            fed = original_inputs if of_stream else inputs
            wanted = list(map(self.model.expert_output, originals, fed))
        if self.lag is not None and wanted is not None:
            lags = (self.lag[places] for places, _ in shares)
            wanted = [output + lag for output, lag in zip(wanted, lags, strict=True)]
        matrices = [original.down for original in originals]
        downs = self._round(matrices, inner, router_weights, w2, wanted)
        return [(*weight.parts(2), down) for weight, down in zip(gates_and_ups, downs, strict=True)]

    def _round(
        self,
        matrices: list[torch.Tensor],
        inputs: list[torch.Tensor],
        router_weights: list[torch.Tensor],
        bits: int,
        wanted: list[torch.Tensor] | None,
    ) -> list[QuantizedWeight]:
        """Round, after moving matrices to wanted outputs if there are."""
        group_size, counts = self.plan.group_size, [len(x) for x in inputs]
        if min(counts) < FEWEST_TOKENS:
            return [quantize_hqq(matrix, bits, group_size) for matrix in matrices]
        weighted = [x * weights for x, weights in zip(inputs, router_weights, strict=True)]
        curvature = Hessian.of(torch.stack([x.T @ x for x in weighted]), counts)
        stacked = torch.stack(matrices)
        if wanted is not None:
            missing = [
                (output * weights - x @ matrix.T).T @ x
                for output, weights, x, matrix in zip(
                    wanted, router_weights, weighted, matrices, strict=True
                )
            ]
            stacked = fitted(stacked, curvature, torch.stack(missing))
        return self.method.quantize(stacked, curvature, bits, group_size)

    def _learned(self, rounded: dict[int, ThreeWeights]) -> dict[int, ThreeWeights]:
        learned = [
            LearnedExpert.of(
                self.model.matrices(self.layer, expert), rounded[expert], self._widths(expert)
            )
            for expert in range(self.layer.num_experts)
        ]
        wanted = torch.zeros_like(self.routed.x)
        for places, output in _original_outputs(self.model, self.layer, self.routed):
            wanted.index_add_(0, places, output)
        steps = self.method.learning_steps
        learn_rounding(learned, self.model.expert_hidden, self.routed, wanted, steps)
        return {number: expert.stored() for number, expert in enumerate(learned)}
