"""Rounds the experts of one layer, some at once."""

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moeq.calibration.config import CalibrationConfig
from moeq.calibration.snapshots import Tensors
from moeq.checkpoint import MoELayer
from moeq.errors import MoeqError
from moeq.model import ExpertMatrices, LayerwiseModel, Routed
from moeq.rounding import quantize_by_inputs
from moeq.workers import Workers
from vllm_moeq.format import Projection


def round_experts(
    config: CalibrationConfig,
    model: LayerwiseModel,
    layer: MoELayer,
    routed: Routed,
    sums: torch.Tensor,
    residual_error: torch.Tensor,
    shares: Sequence[torch.Tensor],
    workers: Workers,
) -> Generator[Tensors]:
    """Round the experts of a layer, and add up their shares.

    Args:
        config: What to round, and how.
        model: Runs the experts.
        layer: Where they are.
        routed: What they get.
        sums: float32 [n, L, hidden_size]: what their shares are added to, in place.
        residual_error: Of the same shape: the original model's sums less those that unrounded
            experts would give here. Changed in place.
        shares: What each expert would add then [n, hidden_size], for the tokens that it gets.
        workers: Each round some of the experts.

    Yields:
        The packed tensors of an expert, by name.

    Raises:
        MoeqError: A weight cannot be quantized; names it.
    """
    # All experts of a token make up for its error: each by the same, times its router weight.
    totals = routed.weights.sum(1, keepdim=True)
    corrections = residual_error.view(routed.x.shape).div_(
        totals.masked_fill(totals == 0, torch.inf)
    )
    flat = sums.view(routed.x.shape)
    task = _Layer(config, model, layer, routed, corrections)
    batches = ((experts, [shares[expert] for expert in experts]) for experts in _batches(task))
    for expert, stored, output in workers.flat_map(_round, task, batches):
        places, weights = routed.of_expert(expert)
        flat.index_add_(0, places, output * weights)
        yield stored


class _Layer(NamedTuple):
    """A layer whose experts are rounded.

    Attributes:
        config: What to round, and how.
        model: Runs the experts.
        layer: Where they are.
        routed: What they get.
        corrections: Of each token [T, hidden_size], what all its experts are to give in addition:
            the residual error, divided by the sum of their router weights.
    """

    config: CalibrationConfig
    model: LayerwiseModel
    layer: MoELayer
    routed: Routed
    corrections: torch.Tensor


def _batches(task: _Layer) -> Iterator[list[int]]:
    """Yield experts to be rounded at once: of equal widths, all with calibration or none."""
    config, layer = task.config, task.layer
    size = config.batch_size(layer)
    bits = config.plan.expert_bits[layer.container]
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for expert in range(layer.num_experts):
        count = len(task.routed.of_expert(expert)[0])
        key = bits.w13[expert], bits.w2[expert], config.is_calibrated(count)
        alike.setdefault(key, []).append(expert)
    for experts in alike.values():
        yield from (experts[i : i + size] for i in range(0, len(experts), size))


@torch.inference_mode()
def _round(
    device: torch.device, task: _Layer, batch: tuple[list[int], list[torch.Tensor]]
) -> Iterator[tuple[int, Tensors, torch.Tensor]]:
    """Yield of each expert its number, its packed tensors, and what it gives for its tokens."""
    yield from _Batch.of(task, device, *batch).rounded()


class _Batch(NamedTuple):
    """Experts that are rounded at once, and what each of them is rounded by.

    Attributes:
        task: The layer.
        model: Runs the experts, where they are rounded.
        experts: Their numbers.
        originals: Their weights.
        places: Of the tokens [n] that the router gives to each.
        x: Inputs [n, hidden_size] of each: of these tokens, or of all.
        weights: Router weights [n, 1] that go with them.
        wanted: What w2 is to give there [n, hidden_size], times router weights.
    """

    task: _Layer
    model: LayerwiseModel
    experts: list[int]
    originals: list[ExpertMatrices]
    places: list[torch.Tensor]
    x: list[torch.Tensor]
    weights: list[torch.Tensor]
    wanted: list[torch.Tensor]

    @classmethod
    def of(
        cls, task: _Layer, device: torch.device, experts: list[int], shares: list[torch.Tensor]
    ) -> "_Batch":
        """Read experts and pick what they get."""
        model, routed = task.model.on(device), task.routed
        originals = [model.matrices(task.layer, expert) for expert in experts]
        places, weights = map(list, zip(*map(routed.of_expert, experts), strict=True))
        if task.config.route_all:
            x, corrections = (
                [every.to(device)] * len(experts) for every in (routed.x, task.corrections)
            )
            weights = [torch.ones(len(routed.x), 1, device=device)] * len(experts)
            shares = [model.expert_output(*parts) for parts in zip(originals, x, strict=True)]
        else:
            x = [routed.x[some].to(device) for some in places]
            corrections = [task.corrections[some].to(device) for some in places]
            weights, shares = ([part.to(device) for part in parts] for parts in (weights, shares))
        wanted = []
        for original, share, weight, correction in zip(
            originals, shares, weights, corrections, strict=True
        ):
            beside_bias = correction if original.w2_bias is None else correction - original.w2_bias
            wanted.append(torch.addcmul(share, weight, beside_bias))
        return cls(task, model, experts, originals, places, x, weights, wanted)

    def rounded(self) -> Iterator[tuple[int, Tensors, torch.Tensor]]:
        """Yield of each expert its number, its packed tensors, and what it gives."""
        model = self.model
        stored: list[Tensors] = [{} for _ in self.experts]
        hidden = [
            model.expert_hidden(original._replace(w13=matrix), tokens)
            for original, matrix, tokens in zip(
                self.originals, self._round("w13", self.x, stored), self.x, strict=True
            )
        ]
        downs = self._round("w2", hidden, stored, self.wanted)
        if self.task.config.route_all:
            hidden = [every[places] for every, places in zip(hidden, self.places, strict=True)]
        outputs = (
            F.linear(tokens, down, original.w2_bias).cpu()
            for original, tokens, down in zip(self.originals, hidden, downs, strict=True)
        )
        yield from zip(self.experts, stored, outputs, strict=True)

    def _round(
        self,
        projection: Projection,
        inputs: list[torch.Tensor],
        stored: list[Tensors],
        wanted: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Round a projection of all experts; keep what is stored, return the weights."""
        config, layer = self.task.config, self.task.layer
        names, plan = layer.projections[projection], config.plan
        bits = plan.expert_bits[layer.container].width(projection, self.experts[0])
        matrices = [getattr(original, projection) for original in self.originals]
        try:
            quantized = quantize_by_inputs(
                matrices,
                inputs,
                self.weights,
                [bits],
                plan.group_size,
                fewest_tokens=config.fewest_tokens,
                wanted=wanted,
            )[bits]
        except ValueError as error:
            where = ", ".join(layer.tensor_name(expert, names[0]) for expert in self.experts)
            raise MoeqError(f"{config.source.folder}: cannot quantize {where}: {error}") from error
        for expert, weight, tensors in zip(self.experts, quantized, stored, strict=True):
            for name, part in zip(names, weight.parts(len(names)), strict=True):
                tensors.update(part.named(layer.tensor_name(expert, name)))
        return [weight.dequantize(bits, plan.group_size) for weight in quantized]
