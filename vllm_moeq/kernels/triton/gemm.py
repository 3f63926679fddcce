"""The two matrix products of a fused MoE layer: experts of every width in one launch.

Each program multiplies BLOCK_N rows of one expert's matrix with up to BLOCK_M tokens; see
``mainloop.py``.
"""
# Code for Triton's compiler: no annotations, and conditions of the compiler apart from others.
# ruff: noqa: D417, SIM102
# mypy: ignore-errors

import triton
import triton.language as tl

from vllm_moeq.kernels.triton.mainloop import BLOCK_K, multiply
from vllm_moeq.kernels.triton.routing import CHANGING, expert_slot


@triton.jit
def _program(tiles_n, blocks_m, GROUP_M: tl.constexpr):
    """Return which rows and which block of tokens this program has: (n, m).

    GROUP_M blocks take turns on the same rows of weights, which then stay in the cache.
    """
    pid = tl.program_id(0)
    group_programs = GROUP_M * tiles_n
    first = pid // group_programs * GROUP_M
    size = tl.minimum(blocks_m - first, GROUP_M)
    within = pid % group_programs
    return within // size, first + within % size


@triton.jit
def _block(
    m, sorted_ptr, block_experts_ptr, ids_ptr, map_ptr, num_choices, num_experts,
    BLOCK_M: tl.constexpr, DIRECT: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """Return the expert of a block of tokens, -1 for none, and its choices (token and turn)."""
    column = tl.arange(0, BLOCK_M)
    if DIRECT:  # each choice is a block
        expert = expert_slot(ids_ptr, map_ptr, m, True, num_experts, MAPPED)
        choices = tl.where(column == 0, m, num_choices)
    else:
        expert = tl.load(block_experts_ptr + m)
        choices = tl.load(sorted_ptr + m * BLOCK_M + column)
    return expert, choices


@triton.jit
def _activate(
    gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr,
):  # fmt: skip
    """Apply the activation of vLLM's name; ``up`` is not used by those without a gate."""
    if ACTIVATION == "silu" or ACTIVATION == "swigluoai":
        if LIMIT is not None:
            gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
            up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        if BETA != 0:
            up += BETA
        result = gate * tl.sigmoid(ALPHA * gate) * up
    else:
        if ACTIVATION == "silu_no_mul":
            result = gate * tl.sigmoid(gate)
        elif ACTIVATION == "gelu" or ACTIVATION == "gelu_no_mul":
            result = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
        elif ACTIVATION == "gelu_tanh" or ACTIVATION == "gelu_tanh_no_mul":
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            result = gate * tl.sigmoid(2 * inner)  # 0.5 * (1 + tanh(inner))
        elif ACTIVATION == "relu" or ACTIVATION == "relu_no_mul":
            result = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        else:
            tl.static_assert(ACTIVATION == "relu2" or ACTIVATION == "relu2_no_mul")
            positive = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
            result = positive * positive
        if up is not None:
            result *= up
    return result


@triton.jit(do_not_specialize=CHANGING)
def w13_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    sums_ptr,
    table_ptr,
    bias_ptr,
    router_weight_ptr,
    intermediate_ptr,
    intermediate_sums_ptr,
    sorted_ptr,
    block_experts_ptr,
    ids_ptr,
    map_ptr,
    num_experts,
    N,
    K,
    intermediate_size,
    padded_intermediate,
    num_choices,
    top_k,
    blocks_m,
    WIDTH_SET: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SUM_SIZE: tl.constexpr,
    MASK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ON_INPUT: tl.constexpr,
    MAPPED: tl.constexpr,
    DIRECT: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """w13 of the expert of every choice, its activation, and the sums that ``w2_kernel`` needs.

    Args:
        x_ptr: Tokens [M, K].
        w_ptr, scale_ptr, table_ptr: Prepared weights; rows of gate and up alternate by eights.
        sums_ptr: float32 [M, groups]; like all sums, not used if DEQUANTIZE.
        bias_ptr: [experts, rows of w13] in canonical order, if BIAS.
        router_weight_ptr: [M, top_k], used if ON_INPUT.
        intermediate_ptr: Output [num_choices, padded_intermediate].
        intermediate_sums_ptr: Output float32 [num_choices, padded_intermediate / SUM_SIZE].
        sorted_ptr, block_experts_ptr: Choices in the order of experts, and the expert of each block
            of them; see ``route_kernel``. Not used if DIRECT.
        ids_ptr, map_ptr, num_experts: Routing as the op has it.
        N: Rows of w13, padded.
        intermediate_size, padded_intermediate: Without padded columns, and with them.
        num_choices: Those of all tokens, M * top_k.
        blocks_m: Blocks of the grid.
        LIMIT, ALPHA, BETA: Of silu and swigluoai; a LIMIT of None is none.
    """
    n, m = _program(N // BLOCK_N, blocks_m, GROUP_M)
    expert, choices = _block(
        m,
        sorted_ptr,
        block_experts_ptr,
        ids_ptr,
        map_ptr,
        num_choices,
        num_experts,
        BLOCK_M,
        DIRECT,
        MAPPED,
    )
    if expert < 0:
        return
    exists = choices < num_choices
    token = tl.where(exists, choices, 0) // top_k
    rows = n * BLOCK_N + tl.arange(0, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    if not DEQUANTIZE:
        sums_ptr += token * (blocks_k * (BLOCK_K // GROUP_SIZE))
    acc = multiply(
        x_ptr + (token.to(tl.int64) * K)[None, :], exists[None, :], w_ptr, scale_ptr,
        sums_ptr, table_ptr, expert, rows, N, K, 0, blocks_k, 0, WIDTH_SET, GROUP_SIZE, 1, MASK_K,
        DEQUANTIZE, BLOCK_M, BLOCK_N, INTERPRETED,
    )  # fmt: skip
    if ON_INPUT:  # the projection is linear: the same as scaling its input
        acc *= tl.load(router_weight_ptr + choices, mask=exists, other=0.0)[None, :].to(tl.float32)
    if GATED:
        COLUMNS: tl.constexpr = BLOCK_N // 2
        eights = tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
        gate, up = tl.split(eights)
        gate = tl.reshape(gate, (COLUMNS, BLOCK_M))
        up = tl.reshape(up, (COLUMNS, BLOCK_M))
    else:
        COLUMNS: tl.constexpr = BLOCK_N
        gate = acc
        up = None
    columns = n * COLUMNS + tl.arange(0, COLUMNS)
    if BIAS:
        inside = columns < intermediate_size
        if GATED:
            bias_ptr += expert * (2 * intermediate_size)
            if ACTIVATION == "swigluoai":
                gate_place = 2 * columns
                up_place = gate_place + 1
            else:
                gate_place = columns
                up_place = columns + intermediate_size
            up += tl.load(bias_ptr + up_place, mask=inside, other=0.0).to(tl.float32)[:, None]
        else:
            bias_ptr += expert * intermediate_size
            gate_place = columns
        gate += tl.load(bias_ptr + gate_place, mask=inside, other=0.0).to(tl.float32)[:, None]
    result = _activate(gate, up, ACTIVATION, LIMIT, ALPHA, BETA).to(
        intermediate_ptr.dtype.element_ty
    )
    target = choices.to(tl.int64)[None, :] * padded_intermediate + columns[:, None]
    tl.store(intermediate_ptr + target, result, mask=exists[None, :])
    if not DEQUANTIZE:  # of the rounded values, which are what w2_kernel multiplies
        values = result.to(tl.float32)
        PARTS: tl.constexpr = COLUMNS // SUM_SIZE
        target = intermediate_sums_ptr + choices * (padded_intermediate // SUM_SIZE) + n * PARTS
        if PARTS == 1:  # Triton 3.6 does not compile a sum within blocks of which there is one
            tl.store(target, tl.sum(values, axis=0), mask=exists)
        else:
            sums = tl.sum(tl.reshape(values, (PARTS, SUM_SIZE, BLOCK_M)), axis=1)
            part = tl.arange(0, PARTS)[:, None]
            tl.store(target[None, :] + part, sums, mask=exists[None, :])


@triton.jit(do_not_specialize=CHANGING)
def w2_kernel(
    intermediate_ptr,
    w_ptr,
    scale_ptr,
    sums_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    sorted_ptr,
    block_experts_ptr,
    ids_ptr,
    map_ptr,
    num_experts,
    N,
    K,
    hidden_size,
    num_choices,
    blocks_m,
    WIDTH_SET: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SUM_SIZE: tl.constexpr,
    BIAS: tl.constexpr,
    MAPPED: tl.constexpr,
    DIRECT: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """w2 of the expert of every choice; ``combine_kernel`` adds the choices of a token.

    Args:
        intermediate_ptr: Output of ``w13_kernel`` [num_choices, K], padded.
        w_ptr, scale_ptr, table_ptr: Prepared weights.
        sums_ptr: float32 [num_choices, K / SUM_SIZE].
        bias_ptr: [experts, hidden_size], if BIAS.
        out_ptr: Output [SPLIT_K, num_choices, hidden_size]: parts to be added.
        sorted_ptr, block_experts_ptr: As in ``w13_kernel``.
        ids_ptr, map_ptr, num_experts, blocks_m: As in ``w13_kernel``.
        N: Rows of w2: ``hidden_size``, padded.
    """
    n, m = _program(N // BLOCK_N, blocks_m, GROUP_M)
    expert, choices = _block(
        m,
        sorted_ptr,
        block_experts_ptr,
        ids_ptr,
        map_ptr,
        num_choices,
        num_experts,
        BLOCK_M,
        DIRECT,
        MAPPED,
    )
    if expert < 0:
        return
    exists = choices < num_choices
    source = tl.where(exists, choices, 0)
    rows = n * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    blocks_k = K // BLOCK_K
    if not DEQUANTIZE:
        sums_ptr += source * (K // SUM_SIZE)
    acc = multiply(
        intermediate_ptr + (source.to(tl.int64) * K)[None, :], exists[None, :], w_ptr, scale_ptr,
        sums_ptr, table_ptr, expert, rows, N, K,
        part * blocks_k // SPLIT_K, (part + 1) * blocks_k // SPLIT_K, 1, WIDTH_SET, GROUP_SIZE,
        GROUP_SIZE // SUM_SIZE, False, DEQUANTIZE, BLOCK_M, BLOCK_N, INTERPRETED,
    )  # fmt: skip
    inside = rows < hidden_size
    if BIAS:
        if part == 0:
            bias = tl.load(bias_ptr + expert * hidden_size + rows, mask=inside, other=0.0)
            acc += bias.to(tl.float32)[:, None]
    place = (part * num_choices + choices).to(tl.int64)[None, :] * hidden_size + rows[:, None]
    tl.store(
        out_ptr + place,
        acc.to(out_ptr.dtype.element_ty),
        mask=exists[None, :] & inside[:, None],
    )
