"""The registered op: torch's own checks, and that compiled models call it as it is."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from support.experts import Experts, expected_output, prepared, random_experts
from vllm_moeq.kernels import fused_experts

HIDDEN = 128
TOLERANCE = {"reference": 1e-6, "cpu": 1e-4}
both_kernels = pytest.mark.parametrize("kernel", TOLERANCE)


def _arguments(
    experts: Experts, kernel: str, dtype: torch.dtype = torch.float32, bias: bool = False
) -> tuple[Any, ...]:
    tokens = 6
    weights, layout = prepared(experts, kernel)
    generator = torch.Generator().manual_seed(0)
    count = len(experts.layout.slots)
    w13_rows, _ = experts.layout.shape("w13")
    return (
        torch.randn(tokens, HIDDEN, generator=generator).to(dtype),
        torch.rand(tokens, 2, generator=generator),
        torch.randint(0, count, (tokens, 2), generator=generator, dtype=torch.int32),
        weights,
        torch.randn(count, w13_rows, generator=generator) if bias else None,
        torch.randn(count, HIDDEN, generator=generator) if bias else None,
        layout,
        torch.arange(count) if bias else None,
        "silu",
        False,
    )


@both_kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration_passes_torchs_checks(kernel: str, dtype: torch.dtype, bias: bool) -> None:
    arguments = _arguments(random_experts([2, 3], [3, 2]), kernel, dtype, bias)
    torch.library.opcheck(fused_experts.default, arguments)


@both_kernels
def test_registration_is_right_about_strides(kernel: str) -> None:
    x, *rest = _arguments(random_experts([2, 3], [3, 2]), kernel)
    assert isinstance(x, torch.Tensor)
    transposed = x.t().contiguous().t()
    torch.library.opcheck(fused_experts.default, (transposed, *rest))


def _assert_close(result: torch.Tensor, expected: torch.Tensor, kernel: str) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=TOLERANCE[kernel] * scale)


def _model(x: torch.Tensor, *rest: Any) -> Any:
    return fused_experts(x * 2, *rest).sin() + x


@both_kernels
def test_compiled_equals_eager(kernel: str) -> None:
    torch._dynamo.reset()
    arguments = _arguments(random_experts([2, 3], [3, 2]), kernel)
    compiled = torch.compile(_model, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), _model(*arguments))


@both_kernels
def test_another_bit_plan_runs_in_the_same_compiled_graph(kernel: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_model, fullgraph=True, backend=counter)
    # The same bytes in another order, so that all shapes are equal.
    for widths in ([2, 3], [3, 2]):
        experts = random_experts(widths, widths)
        x, *rest = _arguments(experts, kernel)
        expected = expected_output(experts, 2 * x, *rest[:2]).sin() + x
        _assert_close(compiled(x, *rest), expected, kernel)
    assert counter.frame_count == 1
