"""Kernels of mixed-bit experts and of dense layers, each behind one op of ``torch.ops.moeq``.

``op.py`` registers the ops and dispatches them through the table in ``dispatch.py``; each kernel
has its own module. ``reference.py`` is the torch implementation that all are tested against.
"""

from vllm_moeq.kernels.call import SWIGLU, Biases, FusedExpertsCall, Routing, SwiGlu
from vllm_moeq.kernels.dispatch import KERNELS, Kernel, select_kernel
from vllm_moeq.kernels.layout import ExpertLayout, ExpertSlot, ExpertWeights
from vllm_moeq.kernels.linear import LinearCall, LinearLayout, LinearWeight
from vllm_moeq.kernels.op import fused_experts, packed_linear
from vllm_moeq.kernels.reference import (
    ACTIVATIONS,
    activate,
    expert_weight,
    linear_weight,
    look_up,
)

__all__ = [
    "ACTIVATIONS",
    "KERNELS",
    "SWIGLU",
    "Biases",
    "ExpertLayout",
    "ExpertSlot",
    "ExpertWeights",
    "FusedExpertsCall",
    "Kernel",
    "LinearCall",
    "LinearLayout",
    "LinearWeight",
    "Routing",
    "SwiGlu",
    "activate",
    "expert_weight",
    "fused_experts",
    "packed_linear",
    "linear_weight",
    "look_up",
    "select_kernel",
]
