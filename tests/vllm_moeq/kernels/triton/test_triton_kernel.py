"""What only the Triton kernel does, interpreted on the CPU; the rest is in test_conformance.py."""

from concurrent.futures import Executor

import pytest
import torch

from support.experts import expected_output, random_experts
from support.interpreter import route
from support.kernels import Runner, random_routing, random_tokens, relative_error, triton_runner
from vllm_moeq.format import WIDTHS
from vllm_moeq.kernels.triton.tiles import TABLE, choose_tiles, is_direct, most_blocks


@pytest.fixture
def runner(interpreter: Executor) -> Runner:
    return triton_runner(interpreter)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "tiles", "direct"),
    [
        (1, 8, 2, 0, True),
        (1, 8, 4, 0, False),
        (7, 5, 2, 1, False),
        (60, 4, 2, 2, False),
        (140, 4, 2, 3, False),
        (150, 2, 2, 4, False),
    ],
)
def test_every_choice_of_tiles(
    runner: Runner, tokens: int, experts: int, top_k: int, tiles: int, direct: bool
) -> None:
    assert choose_tiles(tokens * top_k, experts) == TABLE[tiles][1]
    assert is_direct(tokens * top_k, experts) == direct
    widths = [(1, 2, 3, 4, 8)[i % 5] for i in range(experts)]
    runner.check(
        random_experts(widths, widths[::-1], 64, 128, 128),
        random_tokens(tokens, 128, runner.dtype),
        *random_routing(tokens, top_k, experts),
    )


@pytest.mark.slow
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_are_dequantized_where_there_are_many_tokens(
    runner: Runner, dtype: torch.dtype, group_size: int, bits: int
) -> None:
    """Also with zero points between two codes, and columns that fill no block."""
    experts = random_experts([bits] * 2, [bits] * 2, group_size, 3 * group_size, 128)
    weights, ids = random_routing(60, experts=2)
    assert choose_tiles(ids.numel(), 2).dequantize
    runner.check(experts, random_tokens(60, 3 * group_size, dtype), weights, ids)


@pytest.mark.parametrize("tokens", [1, 9])
def test_ids_that_are_no_expert_are_left_out(runner: Runner, tokens: int) -> None:
    """Nothing is read from where their weights would be."""
    experts = random_experts([3] * 8, [2] * 8)
    weights, ids = random_routing(tokens, experts=8)
    left_out, wrong = ids.clone(), ids.clone()
    left_out[0, 0], wrong[0, 0] = -1, 99
    x = random_tokens(tokens, 128, runner.dtype)
    result = runner.run(experts, x, weights, wrong)
    assert torch.equal(result, runner.run(experts, x, weights, left_out))
    expected = expected_output(experts, x, weights, left_out)
    assert relative_error(result, expected) < runner.errors[x.dtype]


def test_float32_is_refused(runner: Runner) -> None:
    x = random_tokens(3, 128, torch.float32)
    with pytest.raises(ValueError, match=r"not torch\.float32: choose one of them \(--dtype\)"):
        runner.run(random_experts([2, 3], [3, 2]), x, *random_routing(3, experts=2))


@pytest.mark.parametrize("block_m", [16, 32, 128])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "kind"),
    [(1, 2, 8, "any"), (100, 8, 16, "any"), (50, 2, 4, "one"), (33, 2, 5, "mapped")],
)
def test_routing(
    interpreter: Executor, block_m: int, tokens: int, top_k: int, experts: int, kind: str
) -> None:
    """Choices are in the order of work, each expert's filled up to whole blocks, as brute force."""
    _, ids = random_routing(tokens, top_k, 2 * experts if kind == "mapped" else experts)
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
