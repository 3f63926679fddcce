"""The Triton kernel, interpreted on the CPU, against a float64 loop over tokens and experts."""

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import pytest
import torch

from support.experts import Experts, expected_output, random_experts
from support.interpreter import route, run_layer, triton_interpreter
from vllm_moeq.kernels.reference import ACTIVATIONS
from vllm_moeq.kernels.triton.tiles import TABLE, choose_tiles, is_direct, most_blocks

E, HIDDEN, INTERMEDIATE = 5, 256, 384
MIXED = ([1, 2, 3, 4, 8], [8, 4, 1, 2, 3])
# Relative to the norm of the output: roundings of the activation and of the output. The interpreter
# cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 1e-3}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    with triton_interpreter() as pool:
        yield pool


def _routing(tokens: int, top_k: int = 2, experts: int = E) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    return torch.rand(tokens, top_k, generator=generator), ids.int()


def _tokens(count: int, hidden: int = HIDDEN, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(2)).to(dtype)


def _check(
    interpreter: Executor,
    experts: Experts,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "silu",
    **case: Any,
) -> torch.Tensor:
    arguments = (experts, x, topk_weights, topk_ids, activation)
    result = interpreter.submit(run_layer, *arguments, **case).result()
    expected = expected_output(*arguments, **case)
    assert (result.dtype, result.shape) == (x.dtype, x.shape)
    error = (result.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[x.dtype]
    return result


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_width_and_group_size(interpreter: Executor, bits: int, group_size: int) -> None:
    experts = random_experts([bits] * 2, [bits] * 2, group_size, 256, 128)
    _check(interpreter, experts, _tokens(5), *_routing(5, experts=2))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mixed_widths_that_differ_between_projections(
    interpreter: Executor, dtype: torch.dtype
) -> None:
    experts = random_experts(*MIXED, 32, HIDDEN, INTERMEDIATE)
    _check(interpreter, experts, _tokens(9, dtype=dtype), *_routing(9))


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "tiles", "direct"),
    [(1, 8, 2, 0, True), (7, 5, 2, 0, False), (60, 4, 2, 1, False), (140, 4, 2, 2, False)],
)
def test_every_choice_of_tiles(
    interpreter: Executor, tokens: int, experts: int, top_k: int, tiles: int, direct: bool
) -> None:
    assert choose_tiles(tokens * top_k, experts) == TABLE[tiles][1]
    assert is_direct(tokens * top_k, experts) == direct
    widths = [(1, 2, 3, 4, 8)[i % 5] for i in range(experts)]
    _check(
        interpreter,
        random_experts(widths, widths[::-1], 64, 128, 128),
        _tokens(tokens, 128),
        *_routing(tokens, top_k, experts),
    )


@pytest.mark.parametrize(
    ("group_size", "hidden", "intermediate"),
    [(32, 32, 32), (32, 96, 160), (64, 192, 64), (128, 128, 384), (32, 352, 288)],
)
@pytest.mark.parametrize("gated", [True, False])
def test_sizes_that_are_no_multiple_of_a_tile(
    interpreter: Executor, group_size: int, hidden: int, intermediate: int, gated: bool
) -> None:
    experts = random_experts(*MIXED, group_size, hidden, intermediate, gated)
    activation = "silu" if gated else "silu_no_mul"
    _check(interpreter, experts, _tokens(6, hidden), *_routing(6), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_activation(interpreter: Executor, activation: str, bias: bool) -> None:
    gated = not activation.endswith("_no_mul")
    case = {}
    if bias:
        generator = torch.Generator().manual_seed(3)
        case["w13_bias"] = torch.randn(E, 160 * (2 if gated else 1), generator=generator)
        case["w2_bias"] = torch.randn(E, HIDDEN, generator=generator).bfloat16()
    experts = random_experts(*MIXED, 32, HIDDEN, 160, gated)
    _check(interpreter, experts, 4 * _tokens(5), *_routing(5), activation, **case)


def test_experts_of_other_ranks_are_left_out(interpreter: Executor) -> None:
    expert_map = torch.tensor([-1, 3, -1, 0, 1, -1, 4, 2], dtype=torch.int32)
    case = {"expert_map": expert_map, "w2_bias": torch.ones(E, HIDDEN)}
    experts = random_experts(*MIXED, 32, HIDDEN)
    _check(interpreter, experts, _tokens(9), *_routing(9, experts=8), **case)
    weights, ids = torch.ones(1, 2), torch.tensor([[0, 6]])
    assert is_direct(2, 8)
    _check(
        interpreter,
        random_experts([3] * 8, [2] * 8, 32, HIDDEN),
        _tokens(1),
        weights,
        ids,
        expert_map=torch.tensor([-1, 3, -1, 0, 1, -1, 7, 2]),
    )


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("mapped", [False, True])
def test_ids_of_minus_one_are_padding(interpreter: Executor, mapped: bool, tokens: int) -> None:
    weights, ids = _routing(tokens)
    ids[0, 0] = -1
    case = {"expert_map": torch.tensor([1, 0, 3, 2, 4])} if mapped else {}
    _check(interpreter, random_experts(*MIXED, 32, HIDDEN), _tokens(tokens), weights, ids, **case)


def test_experts_without_tokens_change_nothing(interpreter: Executor) -> None:
    weights, ids = _routing(9)
    _check(interpreter, random_experts(*MIXED), _tokens(9, 128), weights, ids.clamp(max=1))


def test_the_same_expert_twice_counts_twice(interpreter: Executor) -> None:
    weights, ids = _routing(9)
    ids[4] = ids[4, 0].item()
    _check(interpreter, random_experts(*MIXED), _tokens(9, 128), weights, ids)


@pytest.mark.parametrize("bias", [False, True])
def test_router_weight_on_input(interpreter: Executor, bias: bool) -> None:
    case: dict[str, Any] = {"on_input": True}
    if bias:
        case |= {"w13_bias": torch.ones(E, 256), "w2_bias": torch.ones(E, 128)}
    _check(interpreter, random_experts(*MIXED), _tokens(9, 128), *_routing(9, 1), **case)


def test_no_tokens(interpreter: Executor) -> None:
    experts = random_experts(*MIXED)
    x = torch.empty(0, 128, dtype=torch.float16)
    weights, ids = torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int32)
    result = interpreter.submit(run_layer, experts, x, weights, ids).result()
    assert (result.dtype, result.shape) == (x.dtype, x.shape)


def test_strided_inputs(interpreter: Executor) -> None:
    x = _tokens(9, 2 * HIDDEN)[:, ::2]
    weights, ids = (tensor.t().contiguous().t() for tensor in _routing(9))
    _check(interpreter, random_experts(*MIXED, 32, HIDDEN), x, weights, ids.long())


def test_equal_inputs_give_equal_bits(interpreter: Executor) -> None:
    experts = random_experts(*MIXED, 32, HIDDEN)
    case = (interpreter, experts, _tokens(9), *_routing(9))
    assert torch.equal(_check(*case), _check(*case))


@pytest.mark.parametrize("tokens", [1, 9])
def test_ids_that_are_no_expert_are_left_out(interpreter: Executor, tokens: int) -> None:
    """Nothing is read from where their weights would be."""
    experts = random_experts([3] * 8, [2] * 8, 32, HIDDEN)
    weights, ids = _routing(tokens, 2, experts=8)
    left_out, wrong = ids.clone(), ids.clone()
    left_out[0, 0], wrong[0, 0] = -1, 99
    x = _tokens(tokens)
    result = interpreter.submit(run_layer, experts, x, weights, wrong).result()
    assert torch.equal(result, _check(interpreter, experts, x, weights, left_out))


def test_arguments_that_do_not_belong_together_are_refused(interpreter: Executor) -> None:
    experts = random_experts(*MIXED, 32, HIDDEN)
    weights, ids = _routing(6)

    def refused(message: str, *arguments: torch.Tensor, **case: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            interpreter.submit(run_layer, experts, *arguments, **case).result()

    refused(r"tokens \[6, 128\] do not fit the layout", _tokens(6, 128), weights, ids)
    refused(r"5 tokens with router weights \[6, 2\]", _tokens(5), weights, ids)
    refused(r"\[6, 1\] and expert ids \[6, 2\]", _tokens(6), weights[:, :1], ids)
    bias = torch.zeros(E, HIDDEN - 1)
    refused(r"w2_bias is \[5, 255\], expected", _tokens(6), weights, ids, w2_bias=bias)


def test_float32_is_refused(interpreter: Executor) -> None:
    x = _tokens(3, 128, torch.float32)
    with pytest.raises(ValueError, match=r"not torch\.float32: choose one of them \(--dtype\)"):
        interpreter.submit(run_layer, random_experts(*MIXED), x, *_routing(3)).result()


@pytest.mark.parametrize("block_m", [16, 32, 128])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "kind"),
    [(1, 2, 8, "any"), (100, 8, 16, "any"), (50, 2, 4, "one"), (33, 2, 5, "mapped")],
)
def test_routing(
    interpreter: Executor, block_m: int, tokens: int, top_k: int, experts: int, kind: str
) -> None:
    """Choices are in the order of work, each expert's filled up to whole blocks, as brute force."""
    _, ids = _routing(tokens, top_k, 2 * experts if kind == "mapped" else experts)
    expert_map = None
    if kind == "one":
        ids.fill_(3)
    if kind == "mapped":
        expert_map = torch.full((2 * experts,), -1).index_copy(
            0, torch.arange(0, 2 * experts, 2), torch.arange(experts)
        )
        ids[0] = -1
    turns = torch.randperm(experts, generator=torch.Generator().manual_seed(4))
    found = interpreter.submit(route, ids, turns, block_m, expert_map).result()

    expected_order, expected_blocks = [], []
    for expert in turns.argsort().tolist():
        mine = [
            choice
            for choice, given in enumerate(ids.flatten().tolist())
            if (given if expert_map is None or given < 0 else expert_map[given]) == expert
        ]
        count = -(-len(mine) // block_m)
        expected_order += mine + [ids.numel()] * (count * block_m - len(mine))
        expected_blocks += [expert] * count
    used = len(expected_blocks)
    assert used <= found["blocks"] == most_blocks(ids.numel(), experts, block_m)
    assert found["order"].tolist()[: used * block_m] == expected_order
    assert found["block_experts"].tolist()[:used] == expected_blocks
    assert set(found["block_experts"].tolist()[used : found["blocks"]]) <= {-1}
    assert set(found["block_experts"].tolist()[found["blocks"] :]) == {-77}
    assert set(found["order"].tolist()[used * block_m :]) == {-77}
