"""What a calibration gives: packed weights on disk, and what the router gave to each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moeq.calibration.snapshots import Tensors
from moeq.rounding import LinearWeight, QuantizedWeight

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
class CalibrationReport:
    """What each expert got of the calibration text.

    Attributes:
        tokens: Of the text.
        fewest_tokens: Experts with fewer were rounded without them.
        route_all: Whether each expert was rounded by all tokens.
        coverage: By container of the layer.
    """

    tokens: int
    fewest_tokens: int
    route_all: bool
    coverage: Mapping[str, Coverage]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as in :data:`REPORT_NAME`."""
        return {
            "tokens": self.tokens,
            "fewest_tokens": self.fewest_tokens,
            "route_all_experts": self.route_all,
            "experts": {name: layer._asdict() for name, layer in self.coverage.items()},
        }

    @property
    def token_counts(self) -> list[int]:
        """Tokens that each expert got, in order."""
        return [count for layer in self.coverage.values() for count in layer.tokens]

    @property
    def uncalibrated(self) -> int:
        """Experts that were rounded without calibration because too few tokens reach them."""
        given = [self.tokens if self.route_all else count for count in self.token_counts]
        return sum(count < self.fewest_tokens for count in given)


@dataclass(frozen=True, slots=True)
class CalibratedExperts:
    """Rounded weights of a whole model, a :class:`moeq.checkpoint.writer.PackedSource`.

    Attributes:
        report: What each expert got.
        read: Takes names of packed tensors; returns them by name.
    """

    report: CalibrationReport
    read: Callable[[Iterable[str]], Tensors]

    def packed(self, weight: str, bits: int) -> Tensors:
        """Return the packed tensors of an expert's weight; its width is known already."""
        return self.read(QuantizedWeight.names(weight))

    def packed_linear(self, weight: str, bits: int) -> Tensors:
        """Return those of the weight of a dense layer."""
        return self.read(LinearWeight.names(weight))
