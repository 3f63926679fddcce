"""Runs a model layer by layer from disk, on text, with experts of any origin."""

from moeq.model.experts import ExpertSource, add_experts, dequantized, run_layer
from moeq.model.layerwise import ExpertMatrices, LayerwiseModel
from moeq.model.stand_ins import Routed

__all__ = [
    "ExpertMatrices",
    "ExpertSource",
    "LayerwiseModel",
    "Routed",
    "add_experts",
    "dequantized",
    "run_layer",
]
