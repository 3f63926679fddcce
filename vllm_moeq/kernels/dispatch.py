"""The table of kernels and the choice among them."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_moeq.kernels import cpu, reference, triton
from vllm_moeq.kernels.layout import ExpertLayout, ExpertWeights

KERNEL_VARIABLE = "MOEQ_KERNEL"
"""Environment variable that chooses a kernel by name; ``auto`` or unset takes the fastest."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of the fused experts.

    Attributes:
        name: Value of ``MOEQ_KERNEL`` that chooses it.
        unavailable: Takes the device of the weights; returns why the kernel cannot run there, or
            None if it can.
        prepare: Repacks canonical weights once after loading; takes their layout and the name of
            the activation too.
        run: Takes the arguments of the op, with prepared weights as ``ExpertWeights``.
    """

    name: str
    unavailable: Callable[[torch.device], str | None]
    prepare: Callable[[ExpertWeights, ExpertLayout, str], ExpertWeights]
    run: Callable[..., torch.Tensor]


KERNELS: tuple[Kernel, ...] = (
    Kernel(name="cpu", unavailable=cpu.unavailable, prepare=cpu.prepare, run=cpu.run),
    Kernel(name="triton", unavailable=triton.unavailable, prepare=triton.prepare, run=triton.run),
    Kernel(
        name="reference",
        unavailable=lambda device: None,
        prepare=lambda weights, layout, activation: weights,
        run=reference.run,
    ),
)
"""All kernels, the fastest first: ``auto`` takes the first that can run. The reference is last."""


def select_kernel(device: torch.device, requested: str | None = None) -> int:
    """Return the index in :data:`KERNELS` of the kernel to use on ``device``.

    Args:
        device: Where the weights are.
        requested: Name of a kernel, or ``auto``; None reads ``MOEQ_KERNEL``.

    Raises:
        ValueError: An explicit choice that does not exist or cannot run here. It is never
            replaced by another kernel in silence.
    """
    if requested is None:
        requested = os.environ.get(KERNEL_VARIABLE, "auto")
    names = [kernel.name for kernel in KERNELS]
    if requested == "auto":
        return next(i for i, kernel in enumerate(KERNELS) if kernel.unavailable(device) is None)
    if requested not in names:
        raise ValueError(
            f"{KERNEL_VARIABLE}={requested!r} is unknown; choose one of {['auto', *names]}"
        )
    index = names.index(requested)
    reason = KERNELS[index].unavailable(device)
    if reason is not None:
        raise ValueError(f"{KERNEL_VARIABLE}={requested!r} cannot run on {device}: {reason}")
    return index
