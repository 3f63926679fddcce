"""All signals behind one interface: a number for each expert, and who gets more bits by it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moeq.checkpoint import MoELayer
from moeq.model import LayerwiseModel
from moeq.sensitivity import Bank, Choice
from moeq.signals.maxvar import max_var
from moeq.signals.random_inputs import data_free_error
from moeq.signals.router_norm import router_norms
from moeq.signals.shape import hill_alpha, kurtosis
from vllm_moeq.format import PROJECTIONS

Needs = Literal["nothing", "initial router", "calibration"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What there is to compute signals from.

    Attributes:
        model: Runs the checkpoint.
        base: Routers from before training, or None.
        bank: What calibration measured.
        bits: Width at which quantization errors are compared, one of the bank's.
    """

    model: LayerwiseModel
    base: Mapping[str, torch.Tensor] | None
    bank: Bank
    bits: int


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal.

    Attributes:
        name: What tables call it.
        needs: What it is computed from, beside the checkpoint.
        cost: What that takes.
        most_bits_to: Whether small or large values get the higher widths.
        source: Where it comes from.
        values: Takes the evidence and a layer; returns float32 [num_experts].
        at_width: Whether it depends on the width in the evidence, though not on calibration.
    """

    name: str
    needs: Needs
    cost: str
    most_bits_to: Literal["small", "large"]
    source: str
    values: Callable[[Evidence, MoELayer], torch.Tensor]
    at_width: bool = False

    def compute(self, evidence: Evidence, layers: Sequence[MoELayer]) -> dict[str, list[float]]:
        """Return the values of every layer, by container."""
        return {layer.container: self.values(evidence, layer).tolist() for layer in layers}

    def order(self, values: Sequence[float]) -> list[int]:
        """Return the experts of a layer, first those that get most bits; ties by number."""
        sign = -1 if self.most_bits_to == "large" else 1
        return sorted(range(len(values)), key=lambda expert: sign * values[expert])


def _error(attribute: str) -> Callable[[Evidence, MoELayer], torch.Tensor]:
    """Return the quantization error at one width, of both projections together."""

    def values(evidence: Evidence, layer: MoELayer) -> torch.Tensor:
        errors, bits = evidence.bank.errors, evidence.bits
        return torch.tensor(
            [
                sum(
                    getattr(errors[Choice(layer.container, expert, projection, bits)], attribute)
                    for projection in PROJECTIONS
                )
                for expert in range(layer.num_experts)
            ]
        )

    return values


def _routing(attribute: str) -> Callable[[Evidence, MoELayer], torch.Tensor]:
    def values(evidence: Evidence, layer: MoELayer) -> torch.Tensor:
        statistics = evidence.bank.routing[layer.container]
        return torch.tensor([float(getattr(expert, attribute)) for expert in statistics])

    return values


def _pmq(evidence: Evidence, layer: MoELayer) -> torch.Tensor:
    frequency, weight = (_routing(name)(evidence, layer) for name in ("frequency", "weight"))
    return frequency * weight * _error("weight")(evidence, layer)


_ROUTERS, _WEIGHTS, _TEXT = "reads routers", "reads all experts", "calibration"
SIGNALS: tuple[Signal, ...] = (
    Signal(
        "router-norm", "initial router", _ROUTERS, "small", "Chowdhury et al., 2026",
        lambda evidence, layer: router_norms(evidence.model.source, layer, evidence.base).values,
    ),
    Signal(
        "final-router-norm", "nothing", _ROUTERS, "small", "Chowdhury et al., 2026: surrogate",
        lambda evidence, layer: router_norms(evidence.model.source, layer, None).values,
    ),
    Signal(
        "maxvar", "nothing", "reads first projections", "large", "Chowdhury et al., 2026",
        lambda evidence, layer: max_var(evidence.model.source, layer),
    ),
    Signal(
        "kurtosis", "nothing", _WEIGHTS, "large", "outliers widen grids",
        lambda evidence, layer: kurtosis(evidence.model.source, layer),
    ),
    Signal(
        "hill-alpha", "nothing", "singular values of all experts", "small",
        "Martin and Mahoney, 2021",
        lambda evidence, layer: hill_alpha(evidence.model.source, layer),
    ),
    Signal(
        "data-free-error", "nothing", "rounds all experts", "large", "of rounding, random inputs",
        lambda evidence, layer: data_free_error(
            evidence.model, layer, evidence.bits, evidence.bank.group_size
        ),
        at_width=True,
    ),
    Signal("frequency", "calibration", _TEXT, "large", "PMQ, 2024", _routing("frequency")),
    Signal("router-weight", "calibration", _TEXT, "large", "PMQ, 2024", _routing("weight")),
    Signal("pmq", "calibration", _TEXT, "large", "PMQ, 2024: product with the error", _pmq),
    Signal("weight-error", "calibration", _TEXT, "large", "of rounding", _error("weight")),
    Signal("output-error", "calibration", _TEXT, "large", "of rounding", _error("output")),
    Signal("sensitivity", "calibration", _TEXT, "large", "Fisher information", _error("loss")),
)  # fmt: skip
"""All signals."""
PMQ = next(signal for signal in SIGNALS if signal.name == "pmq")
