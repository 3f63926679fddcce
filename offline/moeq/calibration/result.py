"""What a calibration gives: packed experts on disk, and what the router gave to each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moeq.calibration.config import CalibrationConfig
from moeq.calibration.snapshots import Tensors

REPORT_NAME = "moeq_calibration.json"
"""What each expert got of the calibration text; beside the packed weights."""


class Coverage(NamedTuple):
    """What the router gives to each expert of a layer on the calibration text.

    Attributes:
        tokens: How many tokens.
        weight: Sum of their router weights.
    """

    tokens: list[int]
    weight: list[float]


@dataclass(frozen=True, slots=True)
class CalibratedExperts:
    """Rounded experts of a whole model, a :class:`moeq.checkpoint.writer.PackedSource`.

    Attributes:
        config: What was asked for.
        coverage: By container of the layer.
        read: Takes a weight's name; returns its packed tensors by name.
    """

    config: CalibrationConfig
    coverage: Mapping[str, Coverage]
    read: Callable[[str], Tensors]

    def packed(self, weight: str, bits: int) -> Tensors:
        """Return the packed tensors of a weight by name; its width is known already."""
        return self.read(weight)

    def report(self) -> dict[str, Any]:
        """Return as JSON what each expert got of the calibration text."""
        return {
            "tokens": self.config.tokens.numel(),
            "fewest_tokens": self.config.fewest_tokens,
            "route_all_experts": self.config.route_all,
            "experts": {name: layer._asdict() for name, layer in self.coverage.items()},
        }

    @property
    def token_counts(self) -> list[int]:
        """Tokens that each expert got, in order."""
        return [count for layer in self.coverage.values() for count in layer.tokens]

    @property
    def uncalibrated(self) -> int:
        """Experts that were rounded without calibration because too few tokens reach them."""
        return sum(not self.config.is_calibrated(count) for count in self.token_counts)
