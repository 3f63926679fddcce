"""Rounding: weights to codes, scales and zero points."""

from moeq.rounding.calibrated import DATA_FREE, FEWEST_TOKENS, METHODS, quantize_by_inputs
from moeq.rounding.gptq import REFINEMENT, Hessian, block_size, gram, gram_block, quantize_gptq
from moeq.rounding.grid import QuantizedWeight
from moeq.rounding.hqq import quantize_hqq
from moeq.rounding.rtn import quantize_rtn
from moeq.rounding.symmetric import LinearWeight, round_linear, round_linear_by_inputs
from moeq.rounding.target import fitted

__all__ = [
    "DATA_FREE",
    "FEWEST_TOKENS",
    "METHODS",
    "REFINEMENT",
    "Hessian",
    "LinearWeight",
    "QuantizedWeight",
    "block_size",
    "fitted",
    "gram",
    "gram_block",
    "quantize_by_inputs",
    "quantize_gptq",
    "quantize_hqq",
    "quantize_rtn",
    "round_linear",
    "round_linear_by_inputs",
]
