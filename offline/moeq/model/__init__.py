"""Runs a model layer by layer from disk, on text, with experts of any origin."""

from moeq.model.encoder_decoder import layerwise_model
from moeq.model.experts import ExpertSource, dequantized, expert_shares, run_layer
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
    "dequantized",
    "expert_shares",
    "layerwise_model",
    "run_layer",
]
