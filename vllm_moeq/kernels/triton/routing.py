"""Routing and the work that is done row by row, around the matrix products."""
# Code for Triton's compiler: no annotations, and conditions of the compiler apart from others.
# ruff: noqa: D417, SIM102
# mypy: ignore-errors

import triton
import triton.language as tl

CHANGING = ("num_choices", "blocks_m", "num_experts")
"""Arguments that change from call to call: no variants of a kernel for special values."""


@triton.jit
def expert_slot(ids_ptr, map_ptr, index, mask, num_experts, MAPPED: tl.constexpr):
    """Return the local expert of choices, -1 for those that are padding or of another rank.

    Ids of ``num_experts`` and more are no experts, and nothing may be read for them: -1, too.
    """
    expert = tl.load(ids_ptr + index, mask=mask, other=-1)
    exists = (expert >= 0) & (expert < num_experts)  # of 64 bits before they are cut off
    expert = expert.to(tl.int32)
    if MAPPED:
        slot = tl.load(map_ptr + expert, mask=exists, other=-1).to(tl.int32)
    else:
        slot = tl.where(exists, expert, -1)
    return slot


@triton.jit(do_not_specialize=CHANGING)
def route_kernel(
    ids_ptr,
    map_ptr,
    num_experts,
    table_ptr,
    sorted_ptr,
    block_experts_ptr,
    num_choices,
    local_experts,
    blocks_m,
    MAPPED: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sort choices by expert, each expert's part filled up to whole blocks of BLOCK_M.

    One program for each expert, and one more that marks the unused blocks. All count all choices,
    so that none waits for another and the result is the same every time.

    Args:
        ids_ptr, map_ptr, num_experts: Routing as the op has it.
        table_ptr: The last column says in which order experts are worked on.
        sorted_ptr: Output int32 [blocks_m * BLOCK_M]: indices of choices; ``num_choices`` is none.
        block_experts_ptr: Output int32 [blocks_m]: expert of each block, -1 for none.
        num_choices: Those of all tokens, M * top_k.
        blocks_m: At least as many as any routing needs.
        BINS: A power of two above ``local_experts``.
    """
    expert = tl.program_id(0)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_choices, BLOCK):
        index = start + tl.arange(0, BLOCK)
        slot = expert_slot(ids_ptr, map_ptr, index, index < num_choices, num_experts, MAPPED)
        counts += tl.histogram(tl.where(slot >= 0, slot, BINS - 1), BINS)
    bins = tl.arange(0, BINS)
    local = bins < local_experts
    blocks = tl.where(local, (counts + (BLOCK_M - 1)) // BLOCK_M, 0)
    if expert == local_experts:
        for block in range(tl.sum(blocks), blocks_m):
            tl.store(block_experts_ptr + block, -1)
    else:
        turns = tl.load(table_ptr + bins * TABLE_COLUMNS + TABLE_COLUMNS - 1, mask=local, other=0)
        turn = tl.sum(tl.where(bins == expert, turns, 0))
        first = tl.sum(tl.where(turns < turn, blocks, 0))
        last = first + tl.sum(tl.where(bins == expert, blocks, 0))
        for block in range(first, last):
            tl.store(block_experts_ptr + block, expert)
        place = first * BLOCK_M
        for start in range(0, num_choices, BLOCK):
            index = start + tl.arange(0, BLOCK)
            slot = expert_slot(ids_ptr, map_ptr, index, index < num_choices, num_experts, MAPPED)
            mine = (slot == expert).to(tl.int32)
            tl.store(sorted_ptr + place + tl.cumsum(mine) - 1, index, mask=mine > 0)
            place += tl.sum(mine)
        rest = place + tl.arange(0, BLOCK_M)
        tl.store(sorted_ptr + rest, num_choices, mask=rest < last * BLOCK_M)


@triton.jit
def sums_kernel(
    x_ptr,
    sums_ptr,
    K,
    groups,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the values of each group of each token: x [M, K] to float32 [M, groups]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    sums = tl.sum(tl.reshape(x, (BLOCK // GROUP_SIZE, GROUP_SIZE)), axis=1)
    group = tl.program_id(1) * (BLOCK // GROUP_SIZE) + tl.arange(0, BLOCK // GROUP_SIZE)
    tl.store(sums_ptr + token * groups + group, sums, mask=group < groups)


@triton.jit(do_not_specialize=CHANGING)
def combine_kernel(
    parts_ptr,
    router_weight_ptr,
    ids_ptr,
    map_ptr,
    num_experts,
    out_ptr,
    hidden_size,
    num_choices,
    top_k,
    MAPPED: tl.constexpr,
    ON_INPUT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the choices of each token by router weight, and the parts of each choice.

    From [SPLIT_K, num_choices, hidden_size] to [M, hidden_size]. Choices of another rank are left
    out; nobody wrote their parts.
    """
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden_size
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(top_k):
        choice = token * top_k + turn
        if expert_slot(ids_ptr, map_ptr, choice, True, num_experts, MAPPED) >= 0:
            result = tl.zeros((BLOCK,), tl.float32)
            for part in tl.static_range(SPLIT_K):
                row = (part * num_choices + choice).to(tl.int64)
                result += tl.load(parts_ptr + row * hidden_size + columns, mask=inside, other=0.0)
            if not ON_INPUT:
                result *= tl.load(router_weight_ptr + choice).to(tl.float32)
            total += result
    place = token.to(tl.int64) * hidden_size + columns
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)
