"""Rounds experts with what they get: layer by layer, quantized layers feeding the next."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from moeq.allocation import plan_sizes
from moeq.calibration.snapshots import Snapshots, Tensors
from moeq.checkpoint.families import Matrix, MoELayer
from moeq.checkpoint.reader import CheckpointReader
from moeq.checkpoint.workspace import work_on
from moeq.errors import MoeqError
from moeq.evaluation.reference import ExpertSource, add_experts, run_layer
from moeq.model.layerwise import LayerwiseModel, Routed
from moeq.planning.cost import (
    expert_weights,
    experts_of_a_token,
    forward_operations,
    gptq_operations,
    hessian_operations,
    working_bytes,
)
from moeq.rounding import (
    Curvature,
    QuantizedWeight,
    fitted,
    quantize_gptq,
    quantize_hqq,
)
from moeq.sensitivity.fisher import check_finite, mapped
from vllm_moeq.format import BitPlan, Projection

FEWEST_TOKENS = 32
"""An expert that gets fewer calibration tokens is rounded without them: so few say more about
themselves than about the expert."""
STREAMS, _SAVED = 4, 2
"""Activations of all tokens that the system keeps in memory or in files, and in each snapshot."""
_WAY = 3
"""To be raised when the same work gives other bytes: unfinished runs cannot go on then."""


class Coverage(NamedTuple):
    """What the router gives to each expert of a layer on the calibration text.

    Attributes:
        tokens: How many tokens.
        weight: Sum of their router weights.
    """

    tokens: list[int]
    weight: list[float]


@dataclass(slots=True)
class Calibration:
    """Rounds all experts of a checkpoint with GPTQ, one layer at a time.

    The original model runs beside the rounded one. Before its down projections are rounded, they
    are fitted to what brings the residual stream back to where it is in the original: see
    :mod:`moeq.rounding.target`. That is not done for experts rounded without calibration.

    What is finished lies in ``folder``, one file for each layer, with the activations that the
    next layer gets: a run that was killed goes on after its last finished layer and gives the
    same bytes.

    Attributes:
        reader: The checkpoint.
        layers: Its MoE layers.
        plan: Widths of the experts.
        tokens: int64 [n, L]: the calibration text.
        device: Where layers run and experts are rounded.
        route_all: Round each expert by all tokens, as if the router had chosen it for each of
            them, instead of by those that it gets.
        fewest_tokens: See :data:`FEWEST_TOKENS`.
        coverage: By container of the layers done so far.
    """

    reader: CheckpointReader
    layers: list[MoELayer]
    plan: BitPlan
    tokens: torch.Tensor
    device: str = "cpu"
    route_all: bool = False
    fewest_tokens: int = FEWEST_TOKENS
    coverage: dict[str, Coverage] = field(default_factory=dict)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the hidden states of all tokens."""
        return 4 * self.tokens.numel() * self.layers[0].hidden_size

    @property
    def disk_bytes(self) -> int:
        """Bytes of files that go at the end: finished layers, activations and their snapshots."""
        packed = plan_sizes(self.plan, self.reader, self.layers).expert_bytes
        return packed + (STREAMS + 2 * _SAVED) * self.activation_bytes

    @property
    def operations(self) -> float:
        """About how many floating-point operations rounding takes; attention is left out."""
        layer = self.layers[0]
        routed = experts_of_a_token(self.reader.config, layer)
        choices = layer.num_experts if self.route_all else routed
        forward = forward_operations(layer)
        # Rounded and not, and what the one lacks; the original model, and the lag of the stream.
        rounded = choices * (2 * forward + hessian_operations(layer) + forward // 3)
        passes = self.tokens.numel() * len(self.layers) * (rounded + 2 * routed * forward)
        return gptq_operations(self.layers) + passes

    @property
    def uncalibrated(self) -> int:
        """Experts that were rounded without calibration because too few tokens reach them."""
        return sum(
            not self._is_calibrated(count)
            for coverage in self.coverage.values()
            for count in coverage.tokens
        )

    def summary(self) -> dict[str, Any]:
        """Return as JSON what each expert got of the calibration text."""
        return {
            "tokens": self.tokens.numel(),
            "fewest_tokens": self.fewest_tokens,
            "route_all_experts": self.route_all,
            "experts": {name: found._asdict() for name, found in self.coverage.items()},
        }

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the memory in use beyond Python and torch themselves."""
        largest = max(self.layers, key=working_bytes)
        hidden, inner = largest.hidden_size, largest.intermediate_size
        size = self._batch_size(largest)
        # All tokens may choose the same experts.
        most = (
            largest.num_experts
            if self.route_all
            else experts_of_a_token(self.reader.config, largest)
        )
        inputs = min(size, most) * self._input_bytes(largest)
        one = 4 * self.tokens.numel() * (hidden + 2 * inner)
        streams = STREAMS * self.activation_bytes
        return streams + inputs + one + size * working_bytes(largest)

    def _input_bytes(self, layer: MoELayer) -> int:
        """Return the most that what an expert gets may take, as it is and with router weights."""
        columns = 2 * layer.hidden_size + 2 * layer.intermediate_size
        return 4 * self.tokens.numel() * columns

    def _batch_size(self, layer: MoELayer) -> int:
        """Return how many experts are rounded at once."""
        # As many as take no more memory than the 16-bit weights of the layer, but at least one.
        each = working_bytes(layer) + (self._input_bytes(layer) if self.route_all else 0)
        return max(1, 2 * layer.num_experts * expert_weights(layer) // each)

    @torch.inference_mode()
    def run(self, folder: Path, resume: bool, progress: bool = True) -> None:
        """Round all experts.

        Args:
            folder: Gets the finished layers; see :meth:`stored`.
            resume: Go on with what is there; otherwise it is removed.
            progress: Show a progress bar.

        Raises:
            MoeqError: A weight or an activation is not finite, or what is there was made from
                something else; names it.
        """
        snapshots = Snapshots(folder)
        snapshots.start(self._fingerprint(), resume)
        model = LayerwiseModel(self.reader, self.layers, torch.device(self.device))
        own = [ExpertSource.original(model)]
        shape = (*self.tokens.shape, self.layers[0].hidden_size)
        hidden, original, lag, x = (
            mapped(folder / f"{name}.bin", shape) for name in ("hidden", "original", "lag", "x")
        )
        streams = {"hidden": hidden, "original": original}
        done, coverage = snapshots.restore(streams) if resume else (0, {})
        self.coverage = {key: Coverage(*value) for key, value in coverage.items()}
        if done == 0:
            model.embed(self.tokens, hidden)
            original.copy_(hidden)
        else:
            model.embed(self.tokens[:1], x[:1])  # for what layers get beside hidden states
        last = max(layer.index for layer in self.layers)
        experts = sum(layer.num_experts for layer in self.layers if layer.index >= done)
        with tqdm(total=experts, desc="round", unit="expert", disable=not progress) as bar:
            for index in range(done, last + 1):
                run_layer(model, index, original, x, own)
                check_finite(model, index, original)
                routed = model.run(index, hidden, x)
                check_finite(model, index, hidden)
                if routed is not None:
                    layer = model.moe_layers[index]
                    lag.copy_(hidden)
                    add_experts(model, layer, routed, lag, own)
                    torch.sub(original, lag, out=lag)
                    tensors: Tensors = {}
                    for stored in self._round_layer(model, layer, routed, hidden, lag):
                        tensors |= stored
                        bar.update()
                    snapshots.save_layer(index, tensors)
                snapshots.save(index + 1, streams, self.coverage)

    def stored(self, folder: Path) -> Callable[[str], Tensors]:
        """Return what reads the packed tensors of a weight by its name, after :meth:`run`."""
        return Snapshots(folder).stored(layer.index for layer in self.layers)

    def _round_layer(
        self,
        model: LayerwiseModel,
        layer: MoELayer,
        routed: Routed,
        hidden: torch.Tensor,
        lag: torch.Tensor,
    ) -> Iterator[Tensors]:
        """Round the experts of a layer, and add their outputs to ``hidden``.

        ``lag`` is what the residual stream would lack after this layer, compared with the
        original model, if its experts were not rounded; it is changed.
        """
        shares = [routed.of_expert(expert) for expert in range(layer.num_experts)]
        self.coverage[layer.container] = Coverage(
            [len(places) for places, _ in shares],
            [float(weights.sum()) for _, weights in shares],
        )
        # All experts of a token make up for its lag: each by the same, times its router weight.
        totals = routed.weights.sum(1, keepdim=True)
        missing = lag.view(routed.x.shape).div_(totals.masked_fill(totals == 0, torch.inf))
        flat = hidden.view(routed.x.shape)
        for batch in self._batches(layer):
            rounded = self._round_batch(model, layer, batch, routed, missing)
            for expert, (stored, output) in rounded.items():
                places, weights = shares[expert]
                flat.index_add_(0, places, output.to(flat.device) * weights)
                yield stored

    def _is_calibrated(self, tokens: int) -> bool:
        """Tell whether an expert that gets so many tokens is rounded by what it gets."""
        return (self.tokens.numel() if self.route_all else tokens) >= self.fewest_tokens

    def _batches(self, layer: MoELayer) -> Iterator[list[int]]:
        """Yield experts to be rounded at once: of equal widths, all with calibration or none."""
        size = self._batch_size(layer)
        bits = self.plan.expert_bits[layer.container]
        alike: dict[tuple[int, int, bool], list[int]] = {}
        for expert, count in enumerate(self.coverage[layer.container].tokens):
            key = bits.w13[expert], bits.w2[expert], self._is_calibrated(count)
            alike.setdefault(key, []).append(expert)
        for experts in alike.values():
            yield from (experts[i : i + size] for i in range(0, len(experts), size))

    def _round_batch(
        self,
        model: LayerwiseModel,
        layer: MoELayer,
        experts: list[int],
        routed: Routed,
        missing: torch.Tensor,
    ) -> dict[int, tuple[Tensors, torch.Tensor]]:
        """Return of each expert its packed tensors, and what it gives for the tokens it gets."""
        originals = [model.matrices(layer, expert) for expert in experts]
        shares = [routed.of_expert(expert) for expert in experts]
        if self.route_all:
            inputs = [(routed.x, torch.ones(len(routed.x), 1), missing)] * len(experts)
        else:
            inputs = [(routed.x[places], weights, missing[places]) for places, weights in shares]
        x, weights, lacks = (
            [part.to(model.device) for part in parts] for parts in zip(*inputs, strict=True)
        )
        stored: list[Tensors] = [{} for _ in experts]

        def rounded(
            inputs: list[torch.Tensor],
            projection: Projection,
            *names: Matrix,
            wanted: Iterable[torch.Tensor] | None = None,
        ) -> list[torch.Tensor]:
            """Round matrices with the same inputs; keep what is stored, return the weights."""
            bits = self.plan.expert_bits[layer.container].width(projection, experts[0])
            matrices = [torch.cat([getattr(o, name) for name in names]) for o in originals]
            try:
                quantized = self._quantize(matrices, inputs, weights, bits, wanted)
            except ValueError as error:
                where = ", ".join(layer.tensor_name(expert, names[0]) for expert in experts)
                raise MoeqError(
                    f"{self.reader.folder}: cannot quantize {where}: {error}"
                ) from error
            for expert, found, tensors in zip(experts, quantized, stored, strict=True):
                for name, weight in zip(names, found.parts(len(names)), strict=True):
                    tensors.update(weight.named(layer.tensor_name(expert, name)))
            return [found.dequantize(bits) for found in quantized]

        size = layer.intermediate_size
        inner = [
            model.expert_hidden(matrix[:size], matrix[size:], tokens)
            for matrix, tokens in zip(rounded(x, "w13", "gate", "up"), x, strict=True)
        ]
        wanted = (
            model.expert_output(original, tokens) + lack
            for original, tokens, lack in zip(originals, x, lacks, strict=True)
        )
        downs = rounded(inner, "w2", "down", wanted=wanted)
        if self.route_all:
            inner = [every[places] for every, (places, _) in zip(inner, shares, strict=True)]
        outputs = (tokens @ down.T for tokens, down in zip(inner, downs, strict=True))
        return dict(zip(experts, zip(stored, outputs, strict=True), strict=True))

    def _quantize(
        self,
        matrices: list[torch.Tensor],
        inputs: list[torch.Tensor],
        router_weights: list[torch.Tensor],
        bits: int,
        wanted: Iterable[torch.Tensor] | None,
    ) -> list[QuantizedWeight]:
        """Round matrices, after moving them to wanted outputs if there are."""
        counts = [len(x) for x in inputs]
        if min(counts) < self.fewest_tokens:
            return [quantize_hqq(matrix, bits, self.plan.group_size) for matrix in matrices]
        # An error counts as much as the router weight that it is multiplied with, squared.
        weighted = [x * weight for x, weight in zip(inputs, router_weights, strict=True)]
        curvature = Curvature.of(torch.stack([x.T @ x for x in weighted]), counts)
        weights = torch.stack(matrices)
        if wanted is not None:
            parts = zip(wanted, router_weights, weighted, matrices, strict=True)
            missing = torch.stack(
                [(output * weight - x @ matrix.T).T @ x for output, weight, x, matrix in parts]
            )
            weights = fitted(weights, curvature, missing)
            del missing  # as large as the matrices
        return quantize_gptq(weights, curvature, bits, self.plan.group_size)

    def _fingerprint(self) -> dict[str, Any]:
        """Return what the result depends on."""
        return work_on(self.reader, self.tokens, self.device) | {
            "way of rounding": _WAY,
            "plan": {key: asdict(bits) for key, bits in self.plan.expert_bits.items()},
            "group size": self.plan.group_size,
            "choice of --route-all-experts": self.route_all,
            "fewest tokens": self.fewest_tokens,
        }
