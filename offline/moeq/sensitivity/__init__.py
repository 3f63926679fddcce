"""How much an error of each expert or dense layer costs the model."""

from moeq.sensitivity.bank import Bank, build
from moeq.sensitivity.expert import Choice, QuantizationError, RoutingStatistics
from moeq.sensitivity.fisher import gradients
from moeq.sensitivity.linear import LinearBank

__all__ = [
    "Bank",
    "Choice",
    "LinearBank",
    "QuantizationError",
    "RoutingStatistics",
    "build",
    "gradients",
]
