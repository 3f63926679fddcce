"""Runs a model layer by layer from disk, on text, with experts of any origin."""

from moeq.model.encoder_decoder import layerwise_model
from moeq.model.experts import ExpertSource, add_experts, dequantized, run_layer
from moeq.model.layerwise import LayerwiseModel
from moeq.model.linear import LinearInputs
from moeq.model.stand_ins import Routed
from moeq.model.stored import NO_WEIGHTS, ExpertMatrices, Weights
from moeq.model.watch import Watch

__all__ = [
    "NO_WEIGHTS",
    "ExpertMatrices",
    "ExpertSource",
    "LayerwiseModel",
    "LinearInputs",
    "Routed",
    "Watch",
    "Weights",
    "add_experts",
    "dequantized",
    "layerwise_model",
    "run_layer",
]
