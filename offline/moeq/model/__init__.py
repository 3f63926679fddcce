"""Runs a model layer by layer from disk, on text, with experts of any origin."""

from moeq.model.encoder_decoder import layerwise_model
from moeq.model.experts import ExpertSource, add_experts, dequantized, run_layer
from moeq.model.layerwise import ExpertMatrices, LayerwiseModel, Watch, Weights
from moeq.model.linear import LinearInputs
from moeq.model.stand_ins import Routed

__all__ = [
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
