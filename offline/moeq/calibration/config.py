"""What a calibration is asked to do, and what that takes."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moeq.checkpoint import MoELayer, SourceModel
from moeq.checkpoint.linear import FULL_WIDTH, LinearGroup, group_widths
from moeq.checkpoint.resume import fingerprint
from moeq.checkpoint.sizes import plan_sizes
from moeq.model.cost import (
    Cost,
    at_once,
    experts_of_a_token,
    fit_operations,
    forward_operations,
    gptq_operations,
    gptq_steps,
    hessian_operations,
    linear_operations,
    linear_working_bytes,
    other_operations,
    tokens_of_experts,
    working_bytes,
)
from moeq.rounding import FEWEST_TOKENS
from vllm_moeq.format import BitPlan

STREAMS, _SAVED = 4, 2
"""Activations of all tokens that the system keeps in memory or in files, and in each snapshot."""
_ALGORITHM_VERSION = 9
"""To be raised when the same work gives other bytes: unfinished runs cannot go on then."""


@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """All that the result of a calibration depends on.

    Attributes:
        source: The model.
        plan: Widths of the experts.
        tokens: int64 [n, L]: the calibration text.
        device: Where layers run and experts are rounded.
        route_all: Round each expert by all tokens, as if the router had chosen it for each of
            them, instead of by those that it gets.
        fewest_tokens: See :data:`moeq.rounding.FEWEST_TOKENS`.
    """

    source: SourceModel
    plan: BitPlan
    tokens: torch.Tensor
    device: str = "cpu"
    route_all: bool = False
    fewest_tokens: int = FEWEST_TOKENS

    def fingerprint(self) -> dict[str, Any]:
        """Return what the result depends on, as JSON, by a name for users."""
        return fingerprint(self.source.reader, self.tokens, self.device) | {
            "algorithm version": _ALGORITHM_VERSION,
            "plan": {key: asdict(bits) for key, bits in self.plan.expert_bits.items()},
            "dense layers of the plan": dict(self.plan.linear_bits),
            "group size": self.plan.group_size,
            "choice of `route_all_experts`": self.route_all,
            "fewest tokens": self.fewest_tokens,
        }

    def is_calibrated(self, tokens: int) -> bool:
        """Tell whether an expert that gets so many tokens is rounded by what it gets."""
        return (self.tokens.numel() if self.route_all else tokens) >= self.fewest_tokens

    def batch_size(self, layer: MoELayer) -> int:
        """Return how many experts of a layer are rounded in one batch."""
        if torch.device(self.device).type == "cpu":  # where batches are not faster
            return 1
        # As many as take no more memory than the 16-bit weights of the layer, but at least one.
        each = working_bytes(layer) + (self._input_bytes(layer) if self.route_all else 0)
        return max(1, 2 * layer.num_experts * layer.expert_weights // each)

    @property
    def linear(self) -> dict[LinearGroup, int]:
        """Dense layers that are to be rounded, with their widths."""
        widths = group_widths(self.plan, self.source.linear)
        return {
            group: bits
            for group, bits in widths.items()
            if bits != FULL_WIDTH and not group.copies(bits, self.plan.group_size)
        }

    def cost(self) -> Cost:
        """Estimate what the calibration takes."""
        steps = sum(
            math.ceil(layer.num_experts / self.batch_size(layer)) * gptq_steps(layer)
            for layer in self.source.layers
        )
        memory, worker = self._memory_bytes(), self._worker_bytes()
        sizes = self._largest.hidden_size, self._largest.intermediate_size
        disk = self._disk_bytes()
        return Cost(self._operations(), steps, memory, worker, disk, self._at_once, sizes)

    @property
    def _activation_bytes(self) -> int:
        """Bytes of the hidden states of all tokens."""
        return 4 * self.tokens.numel() * self.source.hidden_size

    @property
    def _stream_bytes(self) -> int:
        """Bytes of all activations that are kept."""
        # Where a norm follows experts, their sums are apart from the hidden states.
        apart = 2 if self.source.layers[0].family.normalized else 0
        # And what the experts of a layer add, before it is summed up.
        shares = experts_of_a_token(self.source, self.source.layers[0])
        return (STREAMS + apart + shares) * self._activation_bytes

    def _input_bytes(self, layer: MoELayer) -> int:
        """Return the most that what an expert gets may take, as it is and with router weights."""
        columns = 2 * layer.hidden_size + 2 * layer.intermediate_size
        return 4 * self.tokens.numel() * columns

    def _operations(self) -> float:
        layers, tokens = self.source.layers, self.tokens.numel()
        routed = experts_of_a_token(self.source, layers[0])
        choices = layers[0].num_experts if self.route_all else routed
        forward = forward_operations(layers[0])
        # By router: the original model, and its experts in the rounded one. By choice: rounded
        # ones, and their originals where these are other tokens than the router's.
        passes: float = len(layers) * (2 * routed + choices) * forward
        if self.route_all:
            passes += len(layers) * choices * forward
        passes += len(layers) * choices * hessian_operations(layers[0])
        passes += 2 * other_operations(self.source, self.tokens.shape[1])[0]
        samples = tokens * choices / layers[0].num_experts
        fits = sum(layer.num_experts * fit_operations(layer, samples) for layer in layers)
        # Dense layers are watched once for each stage of a layer, which runs as far as that.
        stages = len({group.stage for group in self.linear})
        watched = (stages + 1) / 2 if stages else 0
        passes += watched * other_operations(self.source, self.tokens.shape[1])[0]
        dense = linear_operations(self.linear, 1, tokens)
        return gptq_operations(layers) + tokens * passes + fits + dense

    @property
    def _largest(self) -> MoELayer:
        return max(self.source.layers, key=working_bytes)

    @property
    def _at_once(self) -> int:
        return at_once(self.source.layers, torch.device(self.device))

    def _worker_bytes(self, workers: int = 1) -> int:
        """Return what so many workers take together."""
        largest = self._largest
        hidden, inner = largest.hidden_size, largest.intermediate_size
        size = self.batch_size(largest)
        # All tokens may choose the same experts.
        most = largest.num_experts if self.route_all else experts_of_a_token(self.source, largest)
        inputs = min(size, most) * self._input_bytes(largest)
        one = 4 * self.tokens.numel() * (hidden + 2 * inner)
        times = tokens_of_experts(workers, most, largest.num_experts)
        return round(times * (inputs + one)) + workers * size * working_bytes(largest)

    def _memory_bytes(self) -> int:
        workers = self._worker_bytes(self._at_once)
        return self._stream_bytes + max(workers, linear_working_bytes(self.linear))

    def _disk_bytes(self) -> int:
        """Bytes of finished layers, activations and their snapshots."""
        packed = plan_sizes(self.plan, self.source).expert_bytes
        packed += sum(
            group.num_bytes(bits, self.plan.group_size) for group, bits in self.linear.items()
        )
        return packed + self._stream_bytes + 2 * _SAVED * self._activation_bytes
