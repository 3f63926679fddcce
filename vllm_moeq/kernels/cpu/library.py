"""The compiled kernel as Python functions."""

import ctypes
import logging
from functools import cache

import torch

from vllm_moeq import envs
from vllm_moeq.kernels.cpu.build import (
    INSTRUCTION_SETS,
    PORTABLE,
    BuildError,
    InstructionSet,
    cached_library,
    packaged_library,
)

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of tokens, numbered as ``DType`` in numeric.h."""
ACTIVATIONS = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "relu": 4,
    "relu2": 5,
    "swigluoai": 3,
    "silu_no_mul": 0,
    "gelu_no_mul": 1,
    "gelu_tanh_no_mul": 2,
    "relu_no_mul": 4,
    "relu2_no_mul": 5,
}
"""Activations, numbered as ``Activation`` in numeric.h."""

LIMITED_SILU = 6
"""``Activation`` of silu with parameters that a model chose."""

BAD_EXPERT_ID, BAD_SIZES, OUT_OF_MEMORY = 1, 2, 3
"""What ``moeq_fused_experts`` and ``moeq_linear`` return instead of 0; ``Status`` in moe.h."""

_pointer, _int64, _int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Call(ctypes.Structure):
    """Arguments of ``moeq_fused_experts``; see moe.h."""

    _fields_ = (
        *((name, _pointer) for name in (
            "x", "out", "router_weight", "expert_ids", "expert_map", "w13", "w2", "w13_bias",
            "w2_bias", "layout",
        )),
        *((name, _int64) for name in (
            "hidden_size", "w13_bytes", "w2_bytes", "map_size", "experts", "tokens", "top_k",
        )),
        *((name, _int32) for name in ("dtype", "activation", "int8", "router_weight_on_input")),
        *((name, ctypes.c_float) for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")),
    )  # fmt: skip


class LinearCall(ctypes.Structure):
    """Arguments of ``moeq_linear``; see moe.h."""

    _fields_ = (
        *((name, _pointer) for name in ("x", "out", "tiles", "bias")),
        *((name, _int64) for name in ("tiles_bytes", "rows", "columns", "tokens")),
        *((name, _int32) for name in ("bits", "group_size", "dtype", "int8")),
    )


_SIGNATURES = {
    "moeq_isa": (ctypes.c_char_p, []),
    "moeq_tiles_bytes": (_int64, [_int64] * 4),
    "moeq_repack": (None, [_int64] * 3 + [_pointer] * 3 + [_int64] * 3 + [_pointer, _int64]),
    "moeq_use_huge_pages": (None, [_pointer, _int64]),
    "moeq_fused_experts": (_int32, [ctypes.POINTER(Call)]),
    "moeq_linear": (_int32, [ctypes.POINTER(LinearCall)]),
    "moeq_read": (ctypes.c_uint64, [_pointer, _int64]),
    "moeq_round_columns": (None, [_int64, _int64, ctypes.c_float] + [_pointer] * 7),
    "moeq_descend": (None, [_int64, _int64, ctypes.c_float] + [_pointer] * 5),
    "moeq_search_grids": (
        _int32,
        [_int64] * 3 + [ctypes.c_float] * 2 + [_pointer, _int64] + [_pointer] * 4,
    ),
    "moeq_refine": (None, [_int64] * 3 + [ctypes.c_float] * 2 + [_int64] + [_pointer] * 6),
}


@cache
def load() -> ctypes.CDLL:
    """Return the kernel for this CPU, compiling it if need be.

    The choice holds for the life of the process: weights are laid out for it.

    Raises:
        BuildError: No instruction set of ours runs on this CPU, or it cannot be compiled.
        OSError: It cannot be loaded, or there is no folder to compile it into.
        ValueError: ``MOEQ_CPU_ISA`` is unknown or does not run on this CPU.
    """
    library = _open(_instruction_set())
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _instruction_set() -> InstructionSet:
    name, variable = envs.cpu_isa(), envs.CPU_ISA.name
    if name is None:
        isa = next((isa for isa in INSTRUCTION_SETS if isa.runs_here()), None)
        if isa is None:
            raise BuildError("this CPU has neither AVX2 nor AVX-512")
        return isa
    choices = {isa.name: isa for isa in (*INSTRUCTION_SETS, PORTABLE)}
    if name not in choices:
        raise ValueError(f"{variable}={name!r} is not one of {list(choices)}")
    isa = choices[name]
    if not isa.runs_here():
        lacking = ", ".join(sorted(isa.cpu_flags))
        raise ValueError(f"{variable}={name!r} needs a CPU with {lacking}")
    return isa


def _open(isa: InstructionSet) -> ctypes.CDLL:
    packaged = packaged_library(isa)
    if packaged:
        try:
            return ctypes.CDLL(str(packaged))
        except OSError as error:  # made for a newer system
            logger.info("%s; compiling the kernel here", error)
    return ctypes.CDLL(str(cached_library(isa, envs.cache_dir())))
