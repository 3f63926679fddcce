"""The Triton kernel on a GPU, against float64."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moeq.rounding import QuantizedWeight, columns, quantize_gptq
from moeq.rounding.gptq import Hessian
from support.experts import Experts, random_experts
from support.reference import dequantize
from vllm_moeq.kernels import KERNELS, ExpertWeights, fused_experts, select_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
E, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 512, 768
MIXED = [1, 2, 3, 4, 8, 2, 3, 4]
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3}


class Layer:
    """Experts on the GPU, ready for the op."""

    def __init__(self, experts: Experts) -> None:
        kernel = select_kernel(DEVICE, "triton")
        layout = replace(experts.layout, kernel=kernel)
        on_device = ExpertWeights(*(tensor.to(DEVICE) for tensor in experts.weights))
        self.weights = list(KERNELS[kernel].prepare(on_device, layout, "silu"))
        self.layout = layout.to_tensor()
        self.w13, self.w2 = experts.w13.to(DEVICE), experts.w2.to(DEVICE)

    def run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Run the kernel."""
        result: torch.Tensor = fused_experts(
            x, weights, ids, self.weights, None, None, self.layout, None, "silu", False
        )
        return result

    def expected(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Compute in float64, each expert on all tokens."""
        result = torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
        for slot in range(len(self.w13)):
            gate, up = F.linear(x.double(), self.w13[slot]).chunk(2, -1)
            share = (weights.double() * (ids == slot)).sum(-1, keepdim=True)
            result += share * F.linear(F.silu(gate) * up, self.w2[slot])
        return result


@pytest.fixture(scope="module")
def layer() -> Iterator[Layer]:
    yield Layer(random_experts(MIXED, MIXED[::-1], 64, HIDDEN, INTERMEDIATE))


def _inputs(
    tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, hidden: int = HIDDEN
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    chosen = torch.rand(tokens, E, generator=generator).topk(TOP_K)
    return x.to(DEVICE), chosen.values.to(DEVICE), chosen.indices.int().to(DEVICE)


def _error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 33, 64, 128, 257, 1024, 4096])
def test_numbers_of_tokens(layer: Layer, tokens: int, dtype: torch.dtype) -> None:
    inputs = _inputs(tokens, dtype)
    assert _error(layer.run(*inputs), layer.expected(*inputs)) < TOLERANCE[dtype]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_width_and_group_size(bits: int, group_size: int) -> None:
    layer = Layer(random_experts([bits] * E, [bits] * E, group_size, 384, 256))
    for tokens in (1, 16, 300):
        inputs = _inputs(tokens, hidden=384)
        assert _error(layer.run(*inputs), layer.expected(*inputs)) < 6e-3


@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
def test_a_cuda_graph_follows_the_routing(layer: Layer, tokens: int) -> None:
    x, weights, ids = _inputs(tokens)
    layer.run(x, weights, ids)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layer.run(x, weights, ids)
    for seed in (1, 2, 3):
        for old, new in zip((x, weights, ids), _inputs(tokens, seed=seed), strict=True):
            old.copy_(new)
        result.fill_(float("nan"))
        graph.replay()
        assert _error(result, layer.expected(x, weights, ids)) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
def test_never_waits_for_the_device(layer: Layer, tokens: int) -> None:
    inputs = _inputs(tokens)
    layer.run(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.run(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [1, 5, 64, 300, 4096])
def test_equal_inputs_give_equal_bits_whatever_memory_held(layer: Layer, tokens: int) -> None:
    inputs = _inputs(tokens)
    expected = layer.run(*inputs)
    for _ in range(5):
        poison = torch.full((1 << 28,), float("nan"), device=DEVICE)
        del poison  # the allocator hands it out again
        assert torch.equal(layer.run(*inputs), expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_gptq_is_that_of_the_cpu(bits: int) -> None:
    """Up to codes that flip, since sums are ordered differently."""
    assert columns.in_triton(DEVICE)
    source = torch.Generator().manual_seed(bits)
    x = torch.randn(2, 2000, 600, generator=source)
    x += torch.randn(2, 2000, 1, generator=source)
    weights, hessian = torch.randn(2, 300, 600, generator=source), x.mT @ x
    errors = []
    for device in ("cpu", DEVICE):
        curvature = Hessian.of(hessian.to(device, copy=True), [2000] * 2)
        found = quantize_gptq(weights.to(device), curvature, bits, 128)
        stored = [QuantizedWeight._make(part.cpu() for part in weight) for weight in found]
        rounded = torch.stack([dequantize(*weight, 128, bits) for weight in stored])
        difference = (rounded - weights).double()
        errors.append(((difference @ hessian.double()) * difference).sum())
    assert errors[1] <= (1 + 1e-3) * errors[0]
