"""How much an error of each expert costs the model: its sensitivity to quantization."""

from moeq.sensitivity.bank import Bank, build
from moeq.sensitivity.expert import Choice, QuantizationError, RoutingStatistics
from moeq.sensitivity.fisher import gradients

__all__ = [
    "Bank",
    "Choice",
    "QuantizationError",
    "RoutingStatistics",
    "build",
    "gradients",
]
