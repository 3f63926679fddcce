"""Rounding: weights to codes, scales and zero points."""

from moeq.rounding.rtn import QuantizedWeight, quantize_rtn

__all__ = ["QuantizedWeight", "quantize_rtn"]
