"""torch's ops in C++, for calls of the CPU kernel: ``csrc/ops.cpp``, compiled for this torch.

They take over from the ops in Python once the kernel has prepared weights. Without a compiler, or
without torch's headers, Python calls the kernel: the results are the same.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

from vllm_moeq import envs
from vllm_moeq.kernels.call import SWIGLU
from vllm_moeq.kernels.cpu import library
from vllm_moeq.kernels.cpu.build import BuildError, cached_ops

logger = logging.getLogger(__name__)


class _NamedActivation(ctypes.Structure):
    """An activation by its name; see ops.cpp."""

    _fields_ = (
        ("name", ctypes.c_char * 32),
        *((name, ctypes.c_int32) for name in ("number", "number_with_parameters")),
        *((name, ctypes.c_float) for name in ("limit", "alpha", "beta")),
    )


def take_over(kernel: int) -> None:
    """Let C++ call the kernel where a layout has this index into the dispatch table."""
    ops, functions = _load(), library.load()
    if ops is None:
        return
    known = [_named(name, number) for name, number in library.ACTIVATIONS.items()]
    ops.moeq_use(
        ctypes.c_int64(kernel),
        ctypes.cast(functions.moeq_fused_experts, ctypes.c_void_p),
        ctypes.cast(functions.moeq_linear, ctypes.c_void_p),
        (_NamedActivation * len(known))(*known),
        ctypes.c_int64(len(known)),
    )


@cache
def _load() -> ctypes.CDLL | None:
    headers = Path(torch.__file__ or "").parent
    try:
        return ctypes.CDLL(str(cached_ops(headers, torch.__version__, envs.cache_dir())))
    except (BuildError, OSError) as error:
        logger.info("the moeq CPU kernel is called through Python, which takes longer: %s", error)
        return None


def _named(name: str, number: int) -> _NamedActivation:
    usual = SWIGLU.get(name)
    if usual is None:
        return _NamedActivation(name.encode(), number, -1, 0, 0, 0)
    own = library.LIMITED_SILU if name == "silu" else number
    return _NamedActivation(name.encode(), number, own, *usual)
