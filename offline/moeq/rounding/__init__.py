"""Rounding: weights to codes, scales and zero points."""

from moeq.rounding.gptq import REFINEMENT, Curvature, quantize_gptq
from moeq.rounding.grid import QuantizedWeight
from moeq.rounding.hqq import quantize_hqq
from moeq.rounding.rtn import quantize_rtn

__all__ = [
    "REFINEMENT",
    "Curvature",
    "QuantizedWeight",
    "quantize_gptq",
    "quantize_hqq",
    "quantize_rtn",
]
