"""Rounding: weights to codes, scales and zero points."""

from collections.abc import Callable

import torch

from moeq.rounding.gptq import REFINEMENT, Curvature, quantize_gptq
from moeq.rounding.grid import QuantizedWeight
from moeq.rounding.hqq import quantize_hqq
from moeq.rounding.rtn import quantize_rtn
from moeq.rounding.target import fitted

__all__ = [
    "DATA_FREE",
    "REFINEMENT",
    "Curvature",
    "QuantizedWeight",
    "Rounding",
    "fitted",
    "quantize_gptq",
    "quantize_hqq",
    "quantize_rtn",
]

Rounding = Callable[[torch.Tensor, int, int], QuantizedWeight]
"""Takes a matrix, its width and the group size."""
DATA_FREE: dict[str, Rounding] = {"rtn": quantize_rtn, "hqq": quantize_hqq}
"""Rounding methods without calibration, by the name that ``--method`` takes."""
