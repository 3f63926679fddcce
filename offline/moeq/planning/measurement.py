"""What a measured plan is asked to be."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moeq.allocation import PlanOptions, average_bits, bits_budget, possible_group_sizes
from moeq.checkpoint import SourceModel
from moeq.checkpoint.linear import LinearGroup
from moeq.checkpoint.resume import fingerprint
from moeq.errors import MoeqError
from moeq.model.cost import experts_of_a_token
from moeq.signals import load_base_routers, router_norms
from vllm_moeq.format import LINEAR_WIDTHS, WIDTHS

MEASUREMENT_NAME = "moeq_measurement.json"
"""What was measured of each expert; beside the packed weights."""
_ALGORITHM_VERSION = 10
"""To be raised when the same work gives another plan: unfinished runs cannot go on then."""
_HELD_BACK = 0.25
"""Share of the calibration sequences that judge plans and are not used to make them."""
_JUDGED_TOKENS = 4096
"""Held back at most, or one sequence: more hardly change which plan is the best."""
_ENOUGH_TOKENS = 2048
"""That an expert gets, on average, to be measured: more hardly change which of them need bits."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """All that a measured plan depends on.

    Attributes:
        source: The model.
        options: What is asked of the plan; the strategy is one of :data:`moeq.requests.MEASURED`.
        tokens: int64 [n, L]: calibration text.
        method: How experts are rounded, one of :data:`moeq.rounding.METHODS`.
        device: Where layers run and experts are rounded.
        seed: Of random plans, and of the tokens drawn for the Fisher information.
    """

    source: SourceModel
    options: PlanOptions
    tokens: torch.Tensor
    method: str
    device: torch.device
    seed: int = 0

    @property
    def held_back(self) -> torch.Tensor:
        """Sequences that judge plans; none if there is only one plan."""
        if self.options.strategy != "auto":
            return self.tokens[:0]
        judged = self.tokens.shape[1] * self._share_that_counts
        most = max(1, int(_JUDGED_TOKENS / judged))
        return self.tokens[: min(most, int(len(self.tokens) * _HELD_BACK))]

    @property
    def measured(self) -> torch.Tensor:
        """Sequences that plans are made from: no more than give experts enough tokens."""
        layer, left = self.source.layers[0], self.tokens[len(self.held_back) :]
        share = experts_of_a_token(self.source, layer) / layer.num_experts
        share *= self._share_that_counts
        return left[: max(1, math.ceil(_ENOUGH_TOKENS / share / left.shape[1]))]

    @property
    def _share_that_counts(self) -> float:
        """Of the tokens: experts of a decoder, beside an encoder, see a quarter at most."""
        return 1 / 4 if self.source.layers[0].family.encodes else 1

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Group sizes to choose from."""
        return self.options.group_sizes or (self.options.group_size,)

    @property
    def linear(self) -> tuple[LinearGroup, ...]:
        """Dense layers that are to have fewer than 16 bits, or may have them."""
        if not self.linear_widths:
            return ()
        return tuple(
            group
            for group in self.source.linear
            if group.fits(max(self.group_sizes)) and not self._is_settled(group)
        )

    def _is_settled(self, group: LinearGroup) -> bool:
        """Tell whether the source stores dense layers with the least width, which they keep."""
        least = min(self.linear_widths)
        return all(group.copies(least, group_size) for group_size in self.group_sizes)

    @property
    def linear_widths(self) -> tuple[int, ...]:
        """Widths below 16 bits to choose from for dense layers."""
        if self.options.chooses_linear:
            return LINEAR_WIDTHS
        return (self.options.linear,) if self.options.linear in LINEAR_WIDTHS else ()

    def budget_beside(self, linear: int) -> int:
        """Return the bytes that experts may take beside dense layers of a width, if all have it."""
        return self.total_budget - self._linear_bytes(linear)

    @property
    def total_budget(self) -> int:
        """Bytes that experts may take, and dense layers of :attr:`linear`."""
        return self.budget + self._linear_bytes(self.options.linear)

    def _linear_bytes(self, bits: int) -> int:
        size = max(self.group_sizes)
        return sum(group.num_bytes(group.width(bits, size), size) for group in self.linear)

    @property
    def budget(self) -> int:
        """Bytes that the experts may take, with the largest of several group sizes."""
        if self.options.budget is not None:
            return self.options.budget
        return bits_budget(self.options.bits, self.source.layers, self.options.group_size)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths to choose from: those asked for, or a few around the average."""
        if self.options.levels:
            return tuple(sorted(self.options.levels))
        averages = [
            average_bits(self.budget, self.source.layers, group_size)
            for group_size in self.group_sizes
        ]
        levels = {
            level
            for average in (self.options.bits, *averages)
            if average >= WIDTHS[0]
            for level in replace(self.options, bits=average).resolved_levels()
        }
        first = max(0, WIDTHS.index(min(levels)) - 1)
        return WIDTHS[first : WIDTHS.index(max(levels)) + 2]

    def possible_group_sizes(self) -> list[int]:
        """Return the group sizes with which there is a plan.

        Raises:
            MoeqError: There is none; says why.
        """
        return possible_group_sizes(
            self.group_sizes, self.source.layers, self.widths, self.budget, self.options.constraints
        )

    def check_text(self) -> None:
        """Check that there are sequences to judge plans by.

        Raises:
            MoeqError: Too little text.
        """
        if self.options.strategy == "auto" and not len(self.held_back):
            raise MoeqError(
                f"`strategy` auto needs at least {round(1 / _HELD_BACK)} calibration sequences, "
                f"there are {len(self.tokens)}: give more text or a smaller `seqlen`"
            )

    def fingerprint(self) -> dict[str, Any]:
        """Return what the plan depends on, as JSON, by a name for users."""
        return fingerprint(self.source.reader, self.tokens, str(self.device)) | {
            "algorithm version": _ALGORITHM_VERSION,
            "choice of options for the plan": asdict(self.options),
            "choice of dense layers": {
                " + ".join(group.weights): group.stored_bits for group in self.source.linear
            },
            "initial router": self._router_changes(),
            "method": self.method,
            "seed": self.seed,
        }

    def _router_changes(self) -> dict[str, list[float]]:
        """Return the change of each expert's router norm, by container, if it is to be used."""
        if self.options.base_router is None:
            return {}
        base = load_base_routers(self.options.base_router, self.source.layers)
        return {
            layer.container: router_norms(self.source, layer, base).values.tolist()
            for layer in self.source.layers
        }
