"""Routing and the work that is done row by row, around the matrix products."""
# Code for Triton's compiler: no annotations, and conditions of the compiler apart from others.
# ruff: noqa: D417, SIM102
# mypy: ignore-errors

import triton
import triton.language as tl

CHANGING = ("chosen", "blocks_m", "known")
"""Arguments that change from call to call: no variants of a kernel for special values."""


@triton.jit
def expert_slot(ids_ptr, map_ptr, index, mask, known, MAPPED: tl.constexpr):
    """Return the local expert of choices, -1 for those that are padding or of another rank.

    Ids of ``known`` and more are no experts, and nothing may be read for them: -1, too.
    """
    expert = tl.load(ids_ptr + index, mask=mask, other=-1).to(tl.int32)
    exists = (expert >= 0) & (expert < known)
    if MAPPED:
        slot = tl.load(map_ptr + expert, mask=exists, other=-1).to(tl.int32)
    else:
        slot = tl.where(exists, expert, -1)
    return slot


@triton.jit(do_not_specialize=CHANGING)
def route_kernel(
    ids_ptr,
    map_ptr,
    known,
    table_ptr,
    order_ptr,
    block_ptr,
    chosen,
    experts,
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
        ids_ptr, map_ptr, known: Routing as the op has it.
        table_ptr: The last column says in which order experts are worked on.
        order_ptr: Output int32 [blocks_m * BLOCK_M]: indices of choices; ``chosen`` is none.
        block_ptr: Output int32 [blocks_m]: expert of each block, -1 for none.
        chosen: Choices of all tokens.
        blocks_m: At least as many as any routing needs.
        BINS: A power of two above ``experts``.
    """
    expert = tl.program_id(0)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, chosen, BLOCK):
        index = start + tl.arange(0, BLOCK)
        slot = expert_slot(ids_ptr, map_ptr, index, index < chosen, known, MAPPED)
        counts += tl.histogram(tl.where(slot >= 0, slot, BINS - 1), BINS)
    bins = tl.arange(0, BINS)
    local = bins < experts
    blocks = tl.where(local, (counts + (BLOCK_M - 1)) // BLOCK_M, 0)
    if expert == experts:
        for block in range(tl.sum(blocks), blocks_m):
            tl.store(block_ptr + block, -1)
    else:
        turns = tl.load(table_ptr + bins * TABLE_COLUMNS + TABLE_COLUMNS - 1, mask=local, other=0)
        turn = tl.sum(tl.where(bins == expert, turns, 0))
        first = tl.sum(tl.where(turns < turn, blocks, 0))
        last = first + tl.sum(tl.where(bins == expert, blocks, 0))
        for block in range(first, last):
            tl.store(block_ptr + block, expert)
        place = first * BLOCK_M
        for start in range(0, chosen, BLOCK):
            index = start + tl.arange(0, BLOCK)
            slot = expert_slot(ids_ptr, map_ptr, index, index < chosen, known, MAPPED)
            mine = (slot == expert).to(tl.int32)
            tl.store(order_ptr + place + tl.cumsum(mine) - 1, index, mask=mine > 0)
            place += tl.sum(mine)
        rest = place + tl.arange(0, BLOCK_M)
        tl.store(order_ptr + rest, chosen, mask=rest < last * BLOCK_M)


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
    known,
    out_ptr,
    outer,
    chosen,
    top_k,
    MAPPED: tl.constexpr,
    ON_INPUT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the experts of each token by router weight: [SPLIT_K, chosen, outer] to [M, outer].

    Choices of another rank are left out; nobody wrote their parts.
    """
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < outer
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(top_k):
        choice = token * top_k + turn
        if expert_slot(ids_ptr, map_ptr, choice, True, known, MAPPED) >= 0:
            result = tl.zeros((BLOCK,), tl.float32)
            for part in tl.static_range(SPLIT_K):
                row = (part * chosen + choice).to(tl.int64)
                result += tl.load(parts_ptr + row * outer + columns, mask=inside, other=0.0)
            if not ON_INPUT:
                result *= tl.load(router_weight_ptr + choice).to(tl.float32)
            total += result
    place = token.to(tl.int64) * outer + columns
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)
