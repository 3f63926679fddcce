"""Every expert and dense layer of a model, measured at every width; plans that follow from it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeq.allocation import EXPERTS_ONLY, LINEAR_OPTIONS, LinearChoice, allocate
from moeq.checkpoint import MoELayer
from moeq.checkpoint.linear import FULL_WIDTH, LinearGroup, group_widths, uniform_linear_bits
from moeq.checkpoint.sizes import with_sizes
from moeq.checkpoint.temporary import check_space
from moeq.errors import MoeqError
from moeq.model import ExpertSource, LayerwiseModel, layerwise_model
from moeq.planning.cost import measuring_cost
from moeq.planning.measurement import Measurement
from moeq.progress import Progress
from moeq.sensitivity import Bank, Choice, LinearBank, QuantizationError, build, gradients
from moeq.workers import Workers
from vllm_moeq._version import __version__
from vllm_moeq.format import PROJECTIONS, BitPlan, Projection, Provenance

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """A model that was rounded at every width, with what that does to the loss.

    Attributes:
        measurement: What was asked.
        model: Runs the checkpoint.
        banks: Experts, by group size.
        linear: Dense layers; None if all of them keep 16 bits.
    """

    measurement: Measurement
    model: LayerwiseModel
    banks: Mapping[int, Bank]
    linear: LinearBank | None

    @classmethod
    def measure(
        cls,
        measurement: Measurement,
        folder: Path,
        progress: Progress,
        workers: Workers | None,
    ) -> "MeasuredModel":
        """Round and measure.

        Args:
            measurement: What is asked.
            folder: Gets what is rounded, and keeps it while it is read; layers that are there
                already are not done again.
            progress: Called after every layer and every expert.
            workers: Measure experts; by default the measurement's device does.

        Raises:
            MoeqError: No plan is possible, the disk is too small, or weights or activations are
                not finite.
        """
        group_sizes = measurement.possible_group_sizes()
        for path in folder.glob("*.bin"):  # activations of a killed run, which are made anew
            path.unlink()
        check_space(measuring_cost(measurement).disk_bytes, folder)
        model = layerwise_model(measurement.source, measurement.device)
        tokens, method = measurement.measured, measurement.method
        linear = None
        if measurement.linear:
            linear = LinearBank(
                model, measurement.linear, measurement.linear_widths, group_sizes, method,
                tokens.numel(), folder,
            )  # fmt: skip
        traffic = gradients(model, tokens, folder, measurement.seed, progress, linear)
        banks = build(
            model, traffic, measurement.widths, group_sizes, method, folder, progress, workers
        )
        return cls(measurement, model, banks, linear)

    def source(self, plan: BitPlan) -> ExpertSource:
        """Return the rounded weights of a plan."""
        return self.banks[plan.group_size].source(plan, self.measurement.device, self.linear)

    def least_loss(self) -> BitPlan:
        """Return the plan of least estimated loss within the budget.

        Raises:
            MoeqError: There is no plan within it.
        """
        choice = EXPERTS_ONLY if self.linear is None else self._linear_choice(self.linear)
        return self._allocated(self.measurement.total_budget, choice, "sensitivity")

    def least_loss_beside_full_width(self) -> list[BitPlan]:
        """Return the plan of least loss in as many bytes with dense layers of 16 bits, if any.

        So a measured plan that chooses their widths is not worse than one that does not.
        """
        budget = self.measurement.budget_beside(FULL_WIDTH)
        strategy = "sensitivity, dense layers of 16 bits"
        try:
            return [self._allocated(budget, EXPERTS_ONLY, strategy)]
        except MoeqError:
            logger.info("there is no plan of this size with dense layers of 16 bits")
            return []

    def report(self, plan: BitPlan) -> dict[str, Any]:
        """Return as JSON what was measured of experts and dense layers at the widths of a plan."""
        bank = self.banks[plan.group_size]
        return {
            "tokens": self.measurement.measured.numel(),
            "method": self.measurement.method,
            "experts": {
                layer.container: {
                    "errors": {
                        projection: _errors(plan, bank, layer, projection)
                        for projection in PROJECTIONS
                    },
                    "frequency": [expert.frequency for expert in bank.routing[layer.container]],
                    "router_weight": [expert.weight for expert in bank.routing[layer.container]],
                }
                for layer in bank.layers
            },
            "dense": {} if self.linear is None else self._linear_report(plan, self.linear),
        }

    def _linear_report(self, plan: BitPlan, linear: LinearBank) -> dict[str, Any]:
        widths = group_widths(plan, self.measurement.source.linear)
        return {
            " + ".join(group.weights): {
                "bits": bits,
                "loss": linear.loss(group, plan.group_size, bits),
            }
            for group, bits in widths.items()
            if group in linear.groups
        }

    def _linear_choice(self, linear: LinearBank) -> LinearChoice:
        """Return the dense layers to choose widths for, with the loss of each at each width."""
        options, allowed = self.measurement.options, self.measurement.linear_widths
        if options.chooses_linear:
            allowed = LINEAR_OPTIONS

        def loss(group: LinearGroup, group_size: int, bits: int) -> float:
            if bits not in allowed or bits != group.width(bits, group_size):
                return np.inf
            return linear.loss(group, group_size, bits)

        losses = {
            size: np.array(
                [[loss(group, size, bits) for bits in LINEAR_OPTIONS] for group in linear.groups]
            )
            for size in self.banks
        }
        return LinearChoice(linear.groups, losses)

    def _allocated(self, budget: int, linear: LinearChoice, strategy: str) -> BitPlan:
        """Return the plan of least loss in so many bytes; other dense layers keep 16 bits."""
        measurement = self.measurement
        source, options = measurement.source, measurement.options
        tables = {group_size: bank.losses("loss") for group_size, bank in self.banks.items()}
        allocation = allocate(
            tables, source.layers, measurement.widths, budget, options.constraints, linear
        )
        provenance = Provenance(
            strategy=strategy,
            requested_bits=options.bits,
            source=source.public_name,
            moeq_version=__version__,
            details={
                "widths": list(measurement.widths),
                "group_sizes": list(measurement.group_sizes),
                "constraints": str(options.constraints),
                "estimated_divergence": allocation.solution.loss,
                "gap_to_the_best_plan": allocation.solution.gap,
            },
        )
        rest = [group for group in source.linear if group not in linear.groups]
        dense = uniform_linear_bits(rest, FULL_WIDTH, allocation.group_size)
        plan = BitPlan(
            allocation.group_size,
            allocation.expert_bits,
            provenance,
            allocation.linear_bits | dense,
        )
        return with_sizes(plan, source)


def _errors(
    plan: BitPlan, bank: Bank, layer: MoELayer, projection: Projection
) -> dict[str, list[float]]:
    """Return the errors of a layer's experts at their widths, by what they measure."""
    bits = plan.expert_bits[layer.container]
    errors = [
        bank.errors[Choice(layer.container, expert, projection, bits.width(projection, expert))]
        for expert in range(layer.num_experts)
    ]
    return {name: [getattr(error, name) for error in errors] for name in QuantizationError._fields}
