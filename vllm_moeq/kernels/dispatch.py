"""The table of kernels and the choice among them."""

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_moeq import envs
from vllm_moeq.kernels import cpu, reference, triton
from vllm_moeq.kernels.call import FusedExpertsCall
from vllm_moeq.kernels.cpu import linear as cpu_linear
from vllm_moeq.kernels.layout import ExpertLayout, ExpertWeights
from vllm_moeq.kernels.linear import LinearCall, LinearLayout, LinearWeight


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


class PrepareLinear(Protocol):
    """Repacks the canonical weight of a dense layer once after loading."""

    def __call__(self, weight: LinearWeight, layout: LinearLayout, /) -> LinearWeight:
        """Return as many tensors."""


class RunLinear(Protocol):
    """Runs a dense layer whose weight the same kernel prepared."""

    def __call__(self, call: LinearCall, /) -> torch.Tensor:
        """Return a new contiguous tensor [..., N] of the type of the tokens."""


def _as_it_is(weight: LinearWeight, layout: LinearLayout) -> LinearWeight:
    return weight


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of the layers: a row of the dispatch table.

    Attributes:
        name: Value of ``MOEQ_KERNEL`` that chooses it.
        unavailable: Says why it cannot run.
        prepare: Repacks weights of experts.
        run: Computes experts.
        prepare_linear: Repacks the weight of a dense layer.
        run_linear: Computes a dense layer. Without one of its own a kernel has the reference: on
            GPUs, vLLM's own kernels run dense layers.
    """

    name: str
    unavailable: Unavailable
    prepare: Prepare
    run: Run
    prepare_linear: PrepareLinear = _as_it_is
    run_linear: RunLinear = reference.run_linear


KERNELS: tuple[Kernel, ...] = (
    Kernel(
        name="cpu",
        unavailable=cpu.unavailable,
        prepare=cpu.prepare,
        run=cpu.run,
        prepare_linear=cpu_linear.prepare,
        run_linear=cpu_linear.run,
    ),
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
