"""Runners of the rows of the dispatch table, and random input for them."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from support.experts import Experts, expected_output, prepared
from vllm_moeq.kernels import FusedExpertsCall, cpu, fused_experts, reference
from vllm_moeq.kernels.cpu import library
from vllm_moeq.kernels.cpu.build import INSTRUCTION_SETS, PORTABLE

CPU_ISAS = [isa.name for isa in (*INSTRUCTION_SETS, PORTABLE) if isa.runs_here()]
"""``portable`` is AMX's and AVX-512's kernel made of smaller vectors: tested on any x86-64."""


def slow_where_portable(name: str) -> object:
    """Return a parameter of a test; plain C++ takes a minute to compile and is slow to run."""
    return pytest.param(name, marks=pytest.mark.slow) if PORTABLE.name in name else name


# ‖output - float64‖ / ‖float64‖ for each type of tokens that a kernel takes, the simplest first.
REFERENCE_ERRORS = {
    torch.float32: 2e-6,
    torch.bfloat16: 3e-3,
    torch.float16: 4e-4,
    torch.float64: 2e-6,
}
# Activations are rounded to 16 bits twice, and the output.
CPU_ERRORS = {torch.float32: 4e-4, torch.bfloat16: 3e-3, torch.float16: 6e-4, torch.float64: 4e-4}
# Roundings of the activation and of the output. The interpreter cuts bfloat16 off instead of
# rounding it.
TRITON_ERRORS = {torch.float16: 1e-3, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Runner:
    """Runs the op on one kernel, and knows how exact that is.

    Attributes:
        errors: Largest error for each type of tokens.
        run: Takes the arguments of :func:`run_op` after the row.
    """

    errors: dict[torch.dtype, float]
    run: Callable[..., torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The type to test everything with that has nothing to do with types."""
        return next(iter(self.errors))

    def check(
        self,
        experts: Experts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: str = "silu",
        **case: Any,
    ) -> None:
        """Compare with float64; arguments as those of ``expected_output``."""
        result = self.run(experts, x, topk_weights, topk_ids, activation, **case)
        expected = expected_output(experts, x, topk_weights, topk_ids, activation, **case)
        assert (result.dtype, result.shape) == (x.dtype, x.shape)
        assert relative_error(result, expected) < self.errors[x.dtype]


def run_op(
    row: str,
    experts: Experts,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "silu",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    on_input: bool = False,
    swiglu: tuple[float, float, float] | None = None,
) -> torch.Tensor:
    """Prepare experts for a row of the dispatch table and run the op on them."""
    weights, layout = prepared(experts, row, activation)
    result: torch.Tensor = fused_experts(
        x, topk_weights, topk_ids, weights, w13_bias, w2_bias, layout, expert_map, activation,
        on_input, *(swiglu or ()),
    )  # fmt: skip
    return result


def reference_runner() -> Runner:
    """Return the reference as the CPU runs it."""
    return Runner(REFERENCE_ERRORS, lambda *a, **case: run_op("reference", *a, **case))


def device_reference_runner() -> Runner:
    """Return the reference as devices run it, which must not choose rows."""
    return Runner(REFERENCE_ERRORS, _run_as_on_a_device)


class _CudaLike(torch.Tensor):
    """Computes on the CPU, but takes the branch of a device."""

    is_cuda = True


def _run_as_on_a_device(
    experts: Experts,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "silu",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    on_input: bool = False,
    swiglu: tuple[float, float, float] | None = None,
) -> torch.Tensor:
    call = FusedExpertsCall.from_op(
        x.as_subclass(_CudaLike), topk_weights, topk_ids, experts.weights, w13_bias, w2_bias,
        experts.layout.to_tensor(), expert_map, activation, on_input, *(swiglu or ()),
    )  # fmt: skip
    return reference.run(call).as_subclass(torch.Tensor)


@contextmanager
def cpu_runner(isa: str) -> Iterator[Runner]:
    """Let the CPU kernel be that of an instruction set, with its default activations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEQ_CPU_ISA", isa)
        patch.delenv("MOEQ_CPU_ACTIVATION", raising=False)
        forget_cpu_kernel()
        assert library.load().moeq_isa().decode() == isa
        yield Runner(CPU_ERRORS, lambda *a, **case: run_op("cpu", *a, **case))
    forget_cpu_kernel()


def triton_runner(interpreter: Executor) -> Runner:
    """Return the Triton kernel in the process of an interpreter."""

    def run(*arguments: Any, **case: Any) -> torch.Tensor:
        return interpreter.submit(run_op, "triton", *arguments, **case).result()

    return Runner(TRITON_ERRORS, run)


def forget_cpu_kernel() -> None:
    """Let the CPU kernel be chosen anew; in a process, the first choice holds."""
    library.load.cache_clear()
    cpu._why_not_loaded.cache_clear()


def random_tokens(
    count: int, hidden: int = 256, dtype: torch.dtype = torch.float32, seed: int = 2
) -> torch.Tensor:
    """Return Gaussian tokens."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_routing(
    tokens: int, top_k: int = 2, experts: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return router weights and int32 ids [tokens, top_k] of different experts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    return torch.rand(tokens, top_k, generator=generator), ids.int()


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖result - expected‖ / ‖expected‖."""
    return ((result.double() - expected).norm() / expected.norm()).item()
