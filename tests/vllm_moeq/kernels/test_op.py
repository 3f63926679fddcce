"""The registered op: torch's own checks, and that compiled models call it as it is."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from support.experts import Experts, expected_output, random_experts
from vllm_moeq.kernels import fused_experts

HIDDEN = 128


def _arguments(
    experts: Experts, dtype: torch.dtype = torch.float32, tokens: int = 6, bias: bool = False
) -> tuple[object, ...]:
    generator = torch.Generator().manual_seed(0)
    count = len(experts.layout.slots)
    w13_rows, _ = experts.layout.shape("w13")
    return (
        torch.randn(tokens, HIDDEN, generator=generator).to(dtype),
        torch.rand(tokens, 2, generator=generator),
        torch.randint(0, count, (tokens, 2), generator=generator, dtype=torch.int32),
        list(experts.weights),
        torch.randn(count, w13_rows, generator=generator) if bias else None,
        torch.randn(count, HIDDEN, generator=generator) if bias else None,
        experts.layout.to_tensor(),
        torch.arange(count) if bias else None,
        "silu",
        False,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration_passes_torchs_checks(dtype: torch.dtype, bias: bool) -> None:
    arguments = _arguments(random_experts([2, 3], [3, 2]), dtype, bias=bias)
    torch.library.opcheck(fused_experts.default, arguments)


def test_registration_is_right_about_strides() -> None:
    x, *rest = _arguments(random_experts([2, 3], [3, 2]))
    assert isinstance(x, torch.Tensor)
    transposed = x.t().contiguous().t()
    torch.library.opcheck(fused_experts.default, (transposed, *rest))


def test_the_op_computes_the_experts() -> None:
    experts = random_experts([2, 3, 8], [3, 1, 4])
    arguments = _arguments(experts)
    torch.testing.assert_close(
        fused_experts(*arguments).double(),
        expected_output(experts, *arguments[:3]),
        rtol=1e-4,
        atol=1e-6,
    )


def _model(x: torch.Tensor, *rest: object) -> torch.Tensor:
    return fused_experts(x * 2, *rest).sin() + x


def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    arguments = _arguments(random_experts([2, 3], [3, 2]))
    compiled = torch.compile(_model, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), _model(*arguments))


def test_another_bit_plan_runs_in_the_same_compiled_graph() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_model, fullgraph=True, backend=counter)
    # The same bytes in another order, so that all shapes are equal.
    for widths in ([2, 3], [3, 2]):
        experts = random_experts(widths, widths)
        x, *rest = _arguments(experts)
        expected = expected_output(experts, 2 * x, *rest[:2]).sin() + x
        torch.testing.assert_close(compiled(x, *rest).double(), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
