"""The table of kernels and the choice among them."""

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_moeq import envs
from vllm_moeq.kernels import cpu, reference, triton
from vllm_moeq.kernels.call import FusedExpertsCall
from vllm_moeq.kernels.layout import ExpertLayout, ExpertWeights


class Unavailable(Protocol):
    """Returns why a kernel cannot run on the device of the weights, or None if it can."""

    def __call__(self, device: torch.device, /) -> str | None:
        """Look at what is installed, at the device and at the environment."""


class Prepare(Protocol):
    """Repacks canonical weights once after loading; returns as many tensors."""

    def __call__(
        self, weights: ExpertWeights, layout: ExpertLayout, activation: str, /
    ) -> ExpertWeights:
        """Take the layout of the weights, and the activation, which may decide their order."""


class Run(Protocol):
    """Runs the experts of a call whose weights the same kernel prepared."""

    def __call__(self, call: FusedExpertsCall, /) -> torch.Tensor:
        """Return a new contiguous tensor of the type and shape of the tokens."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of the fused experts: a row of the dispatch table.

    Attributes:
        name: Value of ``MOEQ_KERNEL`` that chooses it.
        unavailable: Says why it cannot run.
        prepare: Repacks weights.
        run: Computes.
    """

    name: str
    unavailable: Unavailable
    prepare: Prepare
    run: Run


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
        requested = envs.kernel()
    names = [kernel.name for kernel in KERNELS]
    if requested == "auto":
        return next(i for i, kernel in enumerate(KERNELS) if kernel.unavailable(device) is None)
    if requested not in names:
        raise ValueError(
            f"{envs.KERNEL.name}={requested!r} is unknown; choose one of {['auto', *names]}"
        )
    index = names.index(requested)
    reason = KERNELS[index].unavailable(device)
    if reason is not None:
        raise ValueError(f"{envs.KERNEL.name}={requested!r} cannot run on {device}: {reason}")
    return index
