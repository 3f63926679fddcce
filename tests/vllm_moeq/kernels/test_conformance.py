"""What every kernel of the dispatch table computes, against a float64 loop over tokens and experts.

All rows run here without a GPU: the reference in both of its branches, the CPU kernel at every
instruction set that this CPU has, the Triton kernel in its interpreter. What only one of them does
is tested beside it.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.experts import expected_output, random_experts, sharded_experts
from support.kernels import (
    CPU_ISAS,
    Runner,
    cpu_runner,
    device_reference_runner,
    random_routing,
    random_tokens,
    reference_runner,
    relative_error,
    slow_where_portable,
    triton_runner,
)
from vllm_moeq.kernels import KERNELS
from vllm_moeq.kernels.reference import ACTIVATIONS

E = 5
MIXED = ([1, 2, 3, 4, 8], [8, 4, 1, 2, 3])
RUNNERS = ("reference", "reference-on-device", "triton", *(f"cpu-{isa}" for isa in CPU_ISAS))


@pytest.fixture(scope="module", params=map(slow_where_portable, RUNNERS))
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """Return each in turn."""
    row, _, isa = request.param.partition("-")
    if row == "cpu":
        with cpu_runner(isa) as found:
            yield found
    elif row == "triton":
        yield triton_runner(request.getfixturevalue("interpreter"))
    else:
        yield device_reference_runner() if isa else reference_runner()


def test_no_row_of_the_dispatch_table_is_left_out() -> None:
    rows = {kernel.name for kernel in KERNELS}
    if not CPU_ISAS:
        rows.remove("cpu")
    assert {runner.partition("-")[0] for runner in RUNNERS} == rows


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_width_and_group_size(runner: Runner, bits: int, group_size: int) -> None:
    experts = random_experts([bits] * 2, [bits] * 2, group_size, 256, 128)
    runner.check(experts, random_tokens(5, dtype=runner.dtype), *random_routing(5, experts=2))


def test_mixed_widths_that_differ_between_projections(runner: Runner) -> None:
    experts = random_experts(*MIXED, 32, 256, 384)
    for dtype in runner.errors:
        runner.check(experts, random_tokens(9, dtype=dtype), *random_routing(9))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group_size", "hidden", "intermediate"),
    [(32, 32, 32), (32, 96, 160), (64, 192, 64), (64, 64, 192), (128, 128, 384), (32, 352, 288)],
)
@pytest.mark.parametrize("gated", [True, False])
def test_sizes_that_are_no_multiple_of_a_tile(
    runner: Runner, group_size: int, hidden: int, intermediate: int, gated: bool
) -> None:
    experts = random_experts(*MIXED, group_size, hidden, intermediate, gated)
    activation = "silu" if gated else "silu_no_mul"
    runner.check(experts, random_tokens(6, hidden, runner.dtype), *random_routing(6), activation)


@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
def test_ranks_with_unequal_shares_add_up(runner: Runner, activation: str) -> None:
    # 176 columns: two whole groups of 64 on the first rank, and on the second 48 in a group.
    whole, ranks = sharded_experts([3, 1], [8, 3], 64, 128, 176, ranks=2, activation=activation)
    x, routing = 2 * random_tokens(3, 128, runner.dtype), random_routing(3, experts=2)
    first, second = (
        runner.run(experts, x, *routing, activation, w13_bias=w13_bias, w2_bias=w2_bias).double()
        for experts, w13_bias, w2_bias in ranks
    )
    experts, w13_bias, w2_bias = whole
    expected = expected_output(experts, x, *routing, activation, w13_bias, w2_bias)
    assert [experts.layout.intermediate_size for experts, _, _ in ranks] == [128, 64]
    assert relative_error(first + second, expected) < 2 * runner.errors[x.dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_activation(runner: Runner, activation: str, bias: bool) -> None:
    gated = not activation.endswith("_no_mul")
    case: dict[str, Any] = {}
    if bias:
        generator = torch.Generator().manual_seed(3)
        case["w13_bias"] = torch.randn(E, 96 * (2 if gated else 1), generator=generator)
        case["w2_bias"] = torch.randn(E, 128, generator=generator).bfloat16()
    experts = random_experts(*MIXED, 32, 128, 96, gated)
    x = 4 * random_tokens(5, 128, runner.dtype)
    runner.check(experts, x, *random_routing(5), activation, **case)


def test_swigluoai_clamps(runner: Runner) -> None:
    # Large enough that gate and up leave [-7, 7].
    x = 100 * random_tokens(5, 128, runner.dtype)
    runner.check(random_experts(*MIXED), x, *random_routing(5), "swigluoai")


@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
@pytest.mark.parametrize("swiglu", [(1.5, 1.0, 0.0), (2.0, 1.3, 0.5), (3.0, 1.702, 1.0)])
def test_models_choose_limit_slope_and_shift_of_swiglu(
    runner: Runner, activation: str, swiglu: tuple[float, float, float]
) -> None:
    experts = random_experts(*MIXED, 32, 128, 96)
    x, routing = 4 * random_tokens(5, 128, runner.dtype), random_routing(5)
    runner.check(experts, x, *routing, activation, swiglu=swiglu)


@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_of_other_ranks_are_left_out(runner: Runner, tokens: int) -> None:
    expert_map = torch.tensor([-1, 3, -1, 0, 1, -1, 4, 2], dtype=torch.int32)
    case: dict[str, Any] = {"expert_map": expert_map, "w2_bias": torch.ones(E, 128)}
    weights, ids = random_routing(tokens, experts=8)
    ids[0] = torch.tensor([0, 6])  # of another rank, and local
    runner.check(
        random_experts(*MIXED), random_tokens(tokens, 128, runner.dtype), weights, ids, **case
    )


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("mapped", [False, True])
def test_ids_of_minus_one_are_padding(runner: Runner, mapped: bool, tokens: int) -> None:
    weights, ids = random_routing(tokens)
    ids[0, 0] = -1
    ids[3:4] = -1  # all of a token
    # The last expert of the map is local: an index of -1 would take it.
    case: dict[str, Any] = {"expert_map": torch.tensor([1, 0, 3, 2, 4])} if mapped else {}
    runner.check(
        random_experts(*MIXED), random_tokens(tokens, 128, runner.dtype), weights, ids, **case
    )


@pytest.mark.parametrize("mapped", [False, True])
def test_ids_that_are_no_experts(
    runner: Runner, mapped: bool, request: pytest.FixtureRequest
) -> None:
    """Kernels for GPUs leave them out, as those of vLLM; on CPUs they are errors."""
    experts, x = random_experts(*MIXED), random_tokens(9, 128, runner.dtype)
    weights, ids = random_routing(9)
    case: dict[str, Any] = {"expert_map": torch.tensor([1, 0, 3, 2, 4])} if mapped else {}
    padded = ids.clone()
    padded[3, 1] = -1
    on_device = request.node.callspec.params["runner"] in ("reference-on-device", "triton")
    for bad in (E, 2**31 - 1, 2**32 + 1):  # the last is 1 in 32 bits
        wrong = ids.long() if bad >= 2**31 else ids.clone()
        wrong[3, 1] = bad
        if on_device:
            result = runner.run(experts, x, weights, wrong, **case)
            assert torch.equal(result, runner.run(experts, x, weights, padded, **case))
        else:
            with pytest.raises(ValueError, match=f"expert ids reach {bad}.*5 local experts"):
                runner.run(experts, x, weights, wrong, **case)
    if mapped and not on_device:
        case = {"expert_map": torch.arange(1, E + 1)}
        with pytest.raises(ValueError, match="5 local experts"):
            runner.run(experts, x, weights, ids, **case)


@pytest.mark.parametrize(
    ("activation", "on_input"),
    [("silu", False), ("silu", True), ("swigluoai", True), ("gelu_tanh", True), ("relu2", True)],
)
def test_a_router_weight_that_is_nan_stays_with_its_token(
    runner: Runner, activation: str, on_input: bool
) -> None:
    experts, x = random_experts(*MIXED), random_tokens(9, 128, runner.dtype)
    weights, ids = random_routing(9, top_k=1 if on_input else 2)
    broken = weights.clone()
    broken[4, 0] = float("nan")
    result = runner.run(experts, x, broken, ids, activation, on_input=on_input)
    good = runner.run(experts, x, weights, ids, activation, on_input=on_input)
    others = [token for token in range(9) if token != 4]
    assert result[4].isnan().all()
    assert torch.equal(result[others], good[others])
    assert not good.isnan().any()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_router_weight_of_no_local_expert_is_not_looked_at(runner: Runner, mapped: bool) -> None:
    weights, ids = random_routing(9, experts=E)
    case: dict[str, Any] = {}
    if mapped:
        case["expert_map"] = torch.tensor([0, 1, 2, 3, -1])
        weights[ids == 4] = float("nan")
    else:
        ids[2:5, 1] = -1
        weights[2:5, 1] = float("nan")
    assert weights.isnan().any()
    x = random_tokens(9, 128, runner.dtype)
    runner.check(random_experts(*MIXED), x, weights, ids, **case)


def test_experts_without_tokens_change_nothing(runner: Runner) -> None:
    weights, ids = random_routing(9)
    ids.clamp_(max=1)
    runner.check(random_experts(*MIXED), random_tokens(9, 128, runner.dtype), weights, ids)


def test_the_same_expert_twice_counts_twice(runner: Runner) -> None:
    weights, ids = random_routing(9)
    ids[4] = ids[4, 0].item()
    runner.check(random_experts(*MIXED), random_tokens(9, 128, runner.dtype), weights, ids)


@pytest.mark.parametrize(
    ("activation", "bias"),
    [("silu", False), ("silu", True), ("swigluoai", True), ("relu2_no_mul", True)],
)
def test_router_weight_on_the_input(runner: Runner, activation: str, bias: bool) -> None:
    gated = not activation.endswith("_no_mul")
    case: dict[str, Any] = {"on_input": True}
    if bias:
        w13_bias = torch.randn(E, 256 if gated else 128, generator=torch.Generator().manual_seed(3))
        case |= {"w13_bias": w13_bias, "w2_bias": torch.ones(E, 128)}
    weights, ids = random_routing(9, top_k=1)
    weights[0] = 0  # the biases of its expert count all the same
    experts = random_experts(*MIXED, gated=gated)
    runner.check(experts, random_tokens(9, 128, runner.dtype), weights, ids, activation, **case)


def test_no_tokens_give_no_output(runner: Runner) -> None:
    x, (weights, ids) = random_tokens(1, 128, runner.dtype)[:0], random_routing(1)
    result = runner.run(random_experts(*MIXED), x, weights[:0], ids[:0])
    assert (result.dtype, result.shape) == (x.dtype, x.shape)


def test_inputs_of_any_strides(runner: Runner) -> None:
    x = random_tokens(9, 256, runner.dtype)[:, ::2]
    weights, ids = (tensor.t().contiguous().t() for tensor in random_routing(9))
    bias = torch.randn(128, E, generator=torch.Generator().manual_seed(3)).t()
    expert_map = torch.tensor([1, 9, 0, 9, 3, 9, 2, 9, 4, 9])[::2]
    case: dict[str, Any] = {"w2_bias": bias, "expert_map": expert_map}
    assert not any(tensor.is_contiguous() for tensor in (x, weights, ids, bias, expert_map))
    runner.check(random_experts(*MIXED), x, weights, ids, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_of_the_router(runner: Runner, dtype: torch.dtype) -> None:
    weights, ids = random_routing(9)
    x = random_tokens(9, 128, runner.dtype)
    runner.check(random_experts(*MIXED), x, weights.to(dtype), ids.long())


def test_equal_inputs_give_equal_bits(runner: Runner) -> None:
    case = (random_experts(*MIXED), random_tokens(9, 128, runner.dtype), *random_routing(9))
    first, second = runner.run(*case), runner.run(*case)
    assert torch.equal(first, second)
    assert relative_error(first, expected_output(*case)) < runner.errors[runner.dtype]


def test_arguments_that_do_not_belong_together_are_refused(runner: Runner) -> None:
    experts, x, (weights, ids) = random_experts(*MIXED), random_tokens(6, 128), random_routing(6)
    x = x.to(runner.dtype)

    def refused(message: str, *arguments: Any, **case: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            runner.run(experts, *arguments, **case)

    wide = random_tokens(6, 256, runner.dtype)
    refused(
        r"tokens \[6, 256\] do not fit the layout, whose hidden_size is 128", wide, weights, ids
    )
    refused(r"tokens \[2, 3, 128\] and expert ids", x.view(2, 3, 128), weights, ids)
    refused(r"5 tokens with router weights \[6, 2\]", x[:5], weights, ids)
    refused(r"router weights \[6, 1\] and expert ids \[6, 2\]", x, weights[:, :1], ids)
    w13_bias, w2_bias = torch.zeros(E, 255), torch.zeros(E - 1, 128)
    refused(r"w13_bias is \[5, 255\], expected \[5, 256\]", x, weights, ids, w13_bias=w13_bias)
    refused(r"w2_bias is \[4, 128\], expected \[5, 128\]", x, weights, ids, w2_bias=w2_bias)
    refused("activation 'tanh' is not one of", x, weights, ids, "tanh")
