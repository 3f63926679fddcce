"""The torch reference kernel against a float64 loop over tokens and experts."""

from typing import Any

import pytest
import torch

from support.experts import Experts, expected_output, random_experts
from vllm_moeq.kernels import FusedExpertsCall
from vllm_moeq.kernels.reference import ACTIVATIONS, run

E, HIDDEN = 5, 128
MIXED = ([1, 2, 3, 4, 8], [8, 4, 1, 2, 3])
# Rounding of the output, relative to its largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
both_devices = pytest.mark.parametrize("device", ["cpu", "cuda-like"])


class _CudaLike(torch.Tensor):
    """Computes on the CPU, but takes the way without choosing rows that devices take."""

    is_cuda = True


def _routing(tokens: int = 9, top_k: int = 2, experts: int = E) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    return torch.rand(tokens, top_k, generator=generator), ids.int()


def _tokens(dtype: torch.dtype = torch.float32, tokens: int = 9) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)


def _check(
    experts: Experts,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "silu",
    device: str = "cpu",
    **case: Any,
) -> None:
    bias = case.get("w13_bias"), case.get("w2_bias")
    expert_map, on_input = case.get("expert_map"), case.get("on_input", False)
    moved = x if device == "cpu" else x.as_subclass(_CudaLike)
    result = run(FusedExpertsCall.from_op(
        moved, topk_weights, topk_ids, experts.weights, *bias, experts.layout.to_tensor(),
        expert_map, activation, on_input,
    )).as_subclass(torch.Tensor)  # fmt: skip
    expected = expected_output(experts, x, topk_weights, topk_ids, activation, **case)
    assert (result.dtype, result.shape) == (x.dtype, x.shape)
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        result.double(), expected, rtol=0, atol=TOLERANCE[x.dtype] * max(scale, 1e-3)
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_width_and_group_size(bits: int, group_size: int) -> None:
    _check(random_experts([bits] * E, [bits] * E, group_size), _tokens(), *_routing())


@both_devices
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mixed_widths_that_differ_between_projections(dtype: torch.dtype, device: str) -> None:
    _check(random_experts(*MIXED), _tokens(dtype), *_routing(), device=device)


@both_devices
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_activation(activation: str, bias: bool, device: str) -> None:
    gated = not activation.endswith("_no_mul")
    case = {}
    if bias:
        generator = torch.Generator().manual_seed(3)
        case["w13_bias"] = torch.randn(E, 256 if gated else 128, generator=generator)
        case["w2_bias"] = torch.randn(E, HIDDEN, generator=generator)
    experts = random_experts(*MIXED, gated=gated)
    _check(experts, 4 * _tokens(), *_routing(), activation, device, **case)


def test_swigluoai_clamps() -> None:
    # Large enough that gate and up leave [-7, 7].
    _check(random_experts(*MIXED), 100 * _tokens(), *_routing(), "swigluoai")


@both_devices
def test_experts_of_other_ranks_are_left_out(device: str) -> None:
    expert_map = torch.tensor([-1, 3, -1, 0, 1, -1, 4, 2], dtype=torch.int32)
    case = {"expert_map": expert_map, "w2_bias": torch.ones(E, HIDDEN)}
    _check(random_experts(*MIXED), _tokens(), *_routing(experts=8), device=device, **case)


@both_devices
@pytest.mark.parametrize("mapped", [False, True])
def test_ids_of_minus_one_are_padding(mapped: bool, device: str) -> None:
    weights, ids = _routing()
    ids[0], ids[3, 1] = -1, -1
    # The last expert of the map is local: an index of -1 would take it.
    case = {"expert_map": torch.tensor([1, 0, 3, 2, 4])} if mapped else {}
    _check(random_experts(*MIXED), _tokens(), weights, ids, device=device, **case)


@both_devices
def test_experts_without_tokens_change_nothing(device: str) -> None:
    weights, ids = _routing()
    _check(random_experts(*MIXED), _tokens(), weights, ids.clamp(max=1), device=device)


@both_devices
@pytest.mark.parametrize("bias", [False, True])
def test_router_weight_on_the_input(bias: bool, device: str) -> None:
    case: dict[str, Any] = {"on_input": True}
    if bias:
        case |= {"w13_bias": torch.ones(E, 256), "w2_bias": torch.ones(E, HIDDEN)}
    weights, ids = _routing(top_k=1)
    weights[0] = 0  # the biases of its expert count all the same
    _check(random_experts(*MIXED), _tokens(), weights, ids, device=device, **case)


@both_devices
def test_no_tokens_give_no_output(device: str) -> None:
    x, weights, ids = _tokens(tokens=0), torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int32)
    moved = x if device == "cpu" else x.as_subclass(_CudaLike)
    experts = random_experts(*MIXED)
    layout = experts.layout.to_tensor()
    result = run(FusedExpertsCall.from_op(
        moved, weights, ids, experts.weights, None, None, layout, None, "silu", False
    ))  # fmt: skip
    assert result.shape == (0, HIDDEN)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_types_of_the_router(ids: torch.dtype, weights: torch.dtype) -> None:
    topk_weights, topk_ids = _routing()
    _check(random_experts(*MIXED), _tokens(), topk_weights.to(weights), topk_ids.to(ids))


def test_float64_inside_is_exact() -> None:
    experts, x, (weights, ids) = random_experts(*MIXED), _tokens().double(), _routing()
    call = FusedExpertsCall.from_op(
        x, weights, ids, experts.weights, None, None, experts.layout.to_tensor(), None, "silu",
        False,
    )  # fmt: skip
    result = run(call, torch.float64)
    expected = expected_output(experts, x, weights, ids)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="'tanh'"):
        _check(random_experts(*MIXED), _tokens(), *_routing(), "tanh")
