"""Mixed-bit fused expert kernels behind one op, ``torch.ops.moeq.fused_experts``.

``op.py`` registers the op and dispatches it through the table in ``dispatch.py``; each kernel has
its own module. ``reference.py`` is the torch implementation that all of them are tested against.
"""

from vllm_moeq.kernels.call import SWIGLU, Biases, FusedExpertsCall, Routing, SwiGlu
from vllm_moeq.kernels.dispatch import KERNELS, Kernel, select_kernel
from vllm_moeq.kernels.layout import ExpertLayout, ExpertSlot, ExpertWeights
from vllm_moeq.kernels.op import fused_experts
from vllm_moeq.kernels.reference import ACTIVATIONS, activate, expert_weight

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
    "Routing",
    "SwiGlu",
    "activate",
    "expert_weight",
    "fused_experts",
    "select_kernel",
]
