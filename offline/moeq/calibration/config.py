"""What a calibration is asked to do."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from moeq.checkpoint import MoELayer, SourceModel
from moeq.checkpoint.linear import FULL_WIDTH, LinearGroup, group_widths
from moeq.checkpoint.resume import fingerprint
from moeq.model.cost import working_bytes
from moeq.rounding import FEWEST_TOKENS
from vllm_moeq.format import BitPlan

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
        each = working_bytes(layer) + (self.input_bytes(layer) if self.route_all else 0)
        return max(1, 2 * layer.num_experts * layer.expert_weights // each)

    def input_bytes(self, layer: MoELayer) -> int:
        """Return the most that what an expert gets may take, as it is and with router weights."""
        columns = 2 * layer.hidden_size + 2 * layer.intermediate_size
        return 4 * self.tokens.numel() * columns

    @property
    def linear(self) -> dict[LinearGroup, int]:
        """Dense layers that are to be rounded, with their widths."""
        widths = group_widths(self.plan, self.source.linear)
        return {
            group: bits
            for group, bits in widths.items()
            if bits != FULL_WIDTH and not group.copies(bits, self.plan.group_size)
        }
