"""Rounds the experts of one layer, some at once."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moeq.calibration.config import CalibrationConfig
from moeq.calibration.snapshots import Tensors
from moeq.checkpoint import MoELayer
from moeq.errors import MoeqError
from moeq.model import ExpertMatrices, LayerwiseModel, Routed
from moeq.rounding import quantize_by_inputs
from vllm_moeq.format import Projection


def round_layer(
    config: CalibrationConfig,
    model: LayerwiseModel,
    layer: MoELayer,
    routed: Routed,
    hidden: torch.Tensor,
    residual_error: torch.Tensor,
) -> Iterator[Tensors]:
    """Round the experts of a layer, and add their outputs to the hidden states.

    Args:
        config: What to round, and how.
        model: Runs the experts.
        layer: Where they are.
        routed: What they get.
        hidden: float32 [n, L, hidden_size]: the residual stream, changed in place.
        residual_error: Of the same shape: what the stream would lack after this layer, compared
            with the original model, if its experts were not rounded. Changed in place.

    Yields:
        The packed tensors of an expert, by name.

    Raises:
        MoeqError: A weight cannot be quantized; names it.
    """
    # All experts of a token make up for its error: each by the same, times its router weight.
    totals = routed.weights.sum(1, keepdim=True)
    missing = residual_error.view(routed.x.shape).div_(totals.masked_fill(totals == 0, torch.inf))
    flat = hidden.view(routed.x.shape)
    for experts in _batches(config, layer, routed):
        batch = _Batch.of(config, model, layer, experts, routed, missing)
        for stored, share, output in batch.rounded():
            flat.index_add_(0, share.places, output.to(flat.device) * share.weights)
            yield stored


def _batches(config: CalibrationConfig, layer: MoELayer, routed: Routed) -> Iterator[list[int]]:
    """Yield experts to be rounded at once: of equal widths, all with calibration or none."""
    size = config.batch_size(layer)
    bits = config.plan.expert_bits[layer.container]
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for expert in range(layer.num_experts):
        count = len(routed.of_expert(expert)[0])
        key = bits.w13[expert], bits.w2[expert], config.is_calibrated(count)
        alike.setdefault(key, []).append(expert)
    for experts in alike.values():
        yield from (experts[i : i + size] for i in range(0, len(experts), size))


class _Share(NamedTuple):
    """The tokens that the router gives to an expert: their places [n] and router weights [n, 1]."""

    places: torch.Tensor
    weights: torch.Tensor


class _Batch(NamedTuple):
    """Experts that are rounded at once, and what each of them is rounded by.

    Attributes:
        config: What to round, and how.
        model: Runs the experts.
        layer: Where they are.
        experts: Their numbers.
        originals: Their weights.
        shares: What the router gives to them.
        x: Inputs [n, hidden_size] of each: of its share, or of all tokens.
        weights: Router weights [n, 1] that go with them.
        lacks: What the residual stream lacks there [n, hidden_size].
    """

    config: CalibrationConfig
    model: LayerwiseModel
    layer: MoELayer
    experts: list[int]
    originals: list[ExpertMatrices]
    shares: list[_Share]
    x: list[torch.Tensor]
    weights: list[torch.Tensor]
    lacks: list[torch.Tensor]

    @classmethod
    def of(
        cls,
        config: CalibrationConfig,
        model: LayerwiseModel,
        layer: MoELayer,
        experts: list[int],
        routed: Routed,
        missing: torch.Tensor,
    ) -> "_Batch":
        """Read experts and pick what they get."""
        originals = [model.matrices(layer, expert) for expert in experts]
        shares = [_Share(*routed.of_expert(expert)) for expert in experts]
        if config.route_all:
            inputs = [(routed.x, torch.ones(len(routed.x), 1), missing)] * len(experts)
        else:
            inputs = [(routed.x[places], weights, missing[places]) for places, weights in shares]
        moved = ([part.to(model.device) for part in parts] for parts in zip(*inputs, strict=True))
        return cls(config, model, layer, experts, originals, shares, *moved)

    def rounded(self) -> Iterator[tuple[Tensors, _Share, torch.Tensor]]:
        """Yield of each expert its packed tensors, its share, and what it gives for that."""
        model = self.model
        stored: list[Tensors] = [{} for _ in self.experts]
        hidden = [
            model.expert_hidden(original._replace(w13=matrix), tokens)
            for original, matrix, tokens in zip(
                self.originals, self._round("w13", self.x, stored), self.x, strict=True
            )
        ]
        wanted = (
            model.expert_output(original._replace(w2_bias=None), tokens) + lack
            for original, tokens, lack in zip(self.originals, self.x, self.lacks, strict=True)
        )
        downs = self._round("w2", hidden, stored, wanted)
        if self.config.route_all:
            hidden = [every[share.places] for every, share in zip(hidden, self.shares, strict=True)]
        outputs = (
            F.linear(tokens, down, original.w2_bias)
            for original, tokens, down in zip(self.originals, hidden, downs, strict=True)
        )
        yield from zip(stored, self.shares, outputs, strict=True)

    def _round(
        self,
        projection: Projection,
        inputs: list[torch.Tensor],
        stored: list[Tensors],
        wanted: Iterable[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Round a projection of all experts; keep what is stored, return the weights."""
        names, plan = self.layer.projections[projection], self.config.plan
        bits = plan.expert_bits[self.layer.container].width(projection, self.experts[0])
        matrices = [getattr(original, projection) for original in self.originals]
        try:
            quantized = quantize_by_inputs(
                matrices,
                inputs,
                self.weights,
                [bits],
                plan.group_size,
                fewest_tokens=self.config.fewest_tokens,
                wanted=wanted,
            )[bits]
        except ValueError as error:
            where = ", ".join(self.layer.tensor_name(expert, names[0]) for expert in self.experts)
            raise MoeqError(
                f"{self.config.source.folder}: cannot quantize {where}: {error}"
            ) from error
        for expert, weight, tensors in zip(self.experts, quantized, stored, strict=True):
            for name, part in zip(names, weight.parts(len(names)), strict=True):
                tensors.update(part.named(self.layer.tensor_name(expert, name)))
        return [weight.dequantize(bits, plan.group_size) for weight in quantized]
