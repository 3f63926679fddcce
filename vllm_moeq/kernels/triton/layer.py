"""One fused MoE layer: five launches, four where no choices need sorting or for many tokens.

A choice is one of the top-k experts of one token; the choices of a call are numbered by token and
then by place among the top-k, so that ``topk_ids`` is their list of experts.
"""

from functools import cache
from math import inf
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]

from vllm_moeq.kernels.call import Biases, FusedExpertsCall, Routing, SwiGlu
from vllm_moeq.kernels.layout import ExpertLayout
from vllm_moeq.kernels.reference import ACTIVATIONS
from vllm_moeq.kernels.triton import gemm
from vllm_moeq.kernels.triton.planes import BLOCK_K, padded
from vllm_moeq.kernels.triton.routing import combine_kernel, route_kernel, sums_kernel
from vllm_moeq.kernels.triton.tiles import (
    Tiles,
    choose_split,
    choose_tiles,
    is_direct,
    most_blocks,
)
from vllm_moeq.kernels.triton.tuned import tuned_table
from vllm_moeq.kernels.triton.weights import PlaneWeights, padded_intermediate

DTYPES = (torch.bfloat16, torch.float16)
INTERPRETED = not isinstance(gemm.w13_kernel, triton.JITFunction)
"""Whether ``TRITON_INTERPRET=1`` runs the kernels with numpy, on tensors of the CPU."""
_COLUMNS = 1024  # of a program that works row by row
_INTERPRETED_SMS = 8


class _Work(NamedTuple):
    """A call, ready to be launched.

    Attributes:
        call: With contiguous tensors.
        planes: Its weights.
        tiles: How the products are cut.
        choices: Those of all tokens, M * top_k.
        direct: Each choice is a block of its own, and nothing is sorted.
        blocks: Blocks of choices; as many as any routing needs.
        routing: Arguments of kernels that look up the expert of a choice.
    """

    call: FusedExpertsCall
    planes: PlaneWeights
    tiles: Tiles
    choices: int
    direct: bool
    blocks: int
    routing: dict[str, Any]


class _Hidden(NamedTuple):
    """What the activation gives.

    Attributes:
        values: [choices, padded intermediate_size], of the type of the tokens.
        sums: float32 [choices, padded intermediate_size / sum_size], of neighbouring values; None
            where weights are dequantized.
        sum_size: How many values are added; divides the group size.
    """

    values: torch.Tensor
    sums: torch.Tensor | None
    sum_size: int


def run(call: FusedExpertsCall, tiles: Tiles | None = None) -> torch.Tensor:
    """Run the experts on weights from ``prepare``.

    Never waits for the device, and no size depends on the routing: safe in CUDA graphs. Equal
    inputs give equal bits.

    An expert id that is no expert is left out, as padding is: to notice it, the host would have to
    wait.

    Args:
        call: What to compute.
        tiles: Others than those of the table, in order to compare them.

    Raises:
        ValueError: Unknown activation, or tokens that are neither bfloat16 nor float16.
    """
    _check(call)
    if not call.routing.topk_ids.numel() or not call.layout.slots:
        return torch.zeros_like(call.x, memory_format=torch.contiguous_format)
    work = _prepare(call, tiles)
    common = _route(work)
    hidden = _first_product(work, common)
    parts = _second_product(work, common, hidden)
    return _combine(work, parts)


def _check(call: FusedExpertsCall) -> None:
    if call.activation not in ACTIVATIONS:
        raise ValueError(f"activation {call.activation!r} is not one of {list(ACTIVATIONS)}")
    if call.x.dtype not in DTYPES:
        raise ValueError(
            f"the triton kernel takes bfloat16 or float16, not {call.x.dtype}: choose one of them "
            "(--dtype), or MOEQ_KERNEL=reference"
        )


def _prepare(call: FusedExpertsCall, tiles: Tiles | None) -> _Work:
    """Decide how the work is cut, from sizes alone."""
    layout, expert_map = call.layout, _contiguous(call.routing.expert_map)
    ids = call.routing.topk_ids.contiguous()
    choices, experts = ids.numel(), len(layout.slots)
    if tiles is None:
        sizes = (layout.hidden_size, layout.intermediate_size, experts)
        tiles = choose_tiles(choices, experts, tuned_table(call.x.device, *sizes))
    direct = is_direct(choices, experts)
    return _Work(
        call._replace(
            x=call.x.contiguous(),
            routing=Routing(call.routing.topk_weights.contiguous(), ids, expert_map),
            biases=Biases(*map(_contiguous, call.biases)),
        ),
        PlaneWeights(*call.weights),
        tiles,
        choices,
        direct,
        choices if direct else most_blocks(choices, experts, tiles.block_m),
        {
            "ids_ptr": ids,
            "map_ptr": expert_map,
            "num_experts": experts if expert_map is None else expert_map.numel(),
            "MAPPED": expert_map is not None,
        },
    )


def _route(work: _Work) -> dict[str, Any]:
    """Sort choices by expert; return the arguments that both products have."""
    tiles, layout, table = work.tiles, work.call.layout, work.planes.table
    ids, experts = work.routing["ids_ptr"], len(layout.slots)
    order = block_experts = None
    if not work.direct:
        order = ids.new_empty(work.blocks * tiles.block_m, dtype=torch.int32)
        block_experts = ids.new_empty(work.blocks, dtype=torch.int32)
        route_kernel[(experts + 1,)](
            table_ptr=table,
            sorted_ptr=order,
            block_experts_ptr=block_experts,
            num_choices=work.choices,
            local_experts=experts,
            blocks_m=work.blocks,
            TABLE_COLUMNS=table.shape[1],
            BLOCK_M=tiles.block_m,
            BINS=triton.next_power_of_2(experts + 1),
            BLOCK=_COLUMNS,
            **work.routing,
        )
    return {
        "table_ptr": table,
        "sorted_ptr": order,
        "block_experts_ptr": block_experts,
        "num_choices": work.choices,
        "blocks_m": work.blocks,
        "GROUP_SIZE": layout.group_size,
        "DIRECT": work.direct,
        "DEQUANTIZE": tiles.dequantize,
        "INTERPRETED": INTERPRETED,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "GROUP_M": tiles.group_m,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **work.routing,
    }


def _first_product(work: _Work, common: dict[str, Any]) -> _Hidden:
    """Sum the groups of the tokens, then w13 of every choice and its activation."""
    call, planes, block_n = work.call, work.planes, work.tiles.block_n
    x, layout = call.x, call.layout
    top_k = call.routing.topk_ids.shape[1]
    sums = None if work.tiles.dequantize else _sums(x, layout)
    columns = padded_intermediate(layout)
    # What one program sums, up to a group.
    sum_size = min(layout.group_size, block_n // 2 if layout.gated else block_n)
    values = x.new_empty((work.choices, columns))
    hidden_sums = None
    if sums is not None:
        hidden_sums = x.new_empty((work.choices, columns // sum_size), dtype=torch.float32)
    rows = planes.w13_scales.shape[-1]
    gemm.w13_kernel[(rows // block_n * work.blocks,)](
        x_ptr=x,
        w_ptr=planes.w13,
        scale_ptr=planes.w13_scales,
        sums_ptr=sums,
        bias_ptr=call.biases.w13,
        router_weight_ptr=call.routing.topk_weights,
        intermediate_ptr=values,
        intermediate_sums_ptr=hidden_sums,
        N=rows,
        K=layout.hidden_size,
        intermediate_size=layout.intermediate_size,
        padded_intermediate=columns,
        top_k=top_k,
        WIDTH_SET=_bits(layout.widths["w13"]),
        SUM_SIZE=sum_size,
        MASK_K=layout.hidden_size % BLOCK_K != 0,
        ACTIVATION=call.activation,
        **_swiglu(call.swiglu),
        GATED=layout.gated,
        BIAS=call.biases.w13 is not None,
        ON_INPUT=call.apply_router_weight_on_input,
        **common,
    )
    return _Hidden(values, hidden_sums, sum_size)


def _sums(x: torch.Tensor, layout: ExpertLayout) -> torch.Tensor:
    """Return the sums of tokens in each group: float32 [M, groups]."""
    groups = padded(layout.hidden_size, BLOCK_K) // layout.group_size
    sums = x.new_empty((len(x), groups), dtype=torch.float32)
    sums_kernel[(len(x), triton.cdiv(groups * layout.group_size, _COLUMNS))](
        x, sums, layout.hidden_size, groups, GROUP_SIZE=layout.group_size, BLOCK=_COLUMNS
    )
    return sums


def _second_product(work: _Work, common: dict[str, Any], hidden: _Hidden) -> torch.Tensor:
    """Multiply with w2 of every choice; return partial sums [split, choices, hidden_size]."""
    call, planes, tiles = work.call, work.planes, work.tiles
    layout, columns = call.layout, hidden.values.shape[1]
    rows = planes.w2_scales.shape[-1]
    split = _split(work, rows // tiles.block_n, columns // BLOCK_K)
    parts = call.x.new_empty(
        (split, work.choices, layout.hidden_size),
        dtype=call.x.dtype if split == 1 else torch.float32,
    )
    gemm.w2_kernel[(rows // tiles.block_n * work.blocks, split)](
        intermediate_ptr=hidden.values,
        w_ptr=planes.w2,
        scale_ptr=planes.w2_scales,
        sums_ptr=hidden.sums,
        bias_ptr=call.biases.w2,
        out_ptr=parts,
        N=rows,
        K=columns,
        hidden_size=layout.hidden_size,
        WIDTH_SET=_bits(layout.widths["w2"]),
        SUM_SIZE=hidden.sum_size,
        BIAS=call.biases.w2 is not None,
        SPLIT_K=split,
        **common,
    )
    return parts


def _combine(work: _Work, parts: torch.Tensor) -> torch.Tensor:
    """Add partial sums and the choices of each token."""
    call = work.call
    out = torch.empty_like(call.x)
    tokens, top_k = call.routing.topk_ids.shape
    combine_kernel[(tokens, triton.cdiv(call.layout.hidden_size, _COLUMNS))](
        parts_ptr=parts,
        router_weight_ptr=call.routing.topk_weights,
        out_ptr=out,
        hidden_size=call.layout.hidden_size,
        num_choices=work.choices,
        top_k=top_k,
        ON_INPUT=call.apply_router_weight_on_input,
        SPLIT_K=parts.shape[0],
        BLOCK=_COLUMNS,
        **work.routing,
    )
    return out


def _split(work: _Work, blocks_n: int, blocks_k: int) -> int:
    """Return how many programs share the columns of a product of this many blocks."""
    choices, block_m, experts = work.choices, work.tiles.block_m, len(work.call.layout.slots)
    # Blocks of choices that have work, about: one for each expert, or full ones.
    busy = min(choices, work.blocks, max(experts, choices // block_m))
    wanted = work.tiles.programs_per_sm * _sm_count(work.call.x.device)
    return choose_split(blocks_n * busy, blocks_k, wanted)


def _swiglu(parameters: SwiGlu | None) -> dict[str, float | None]:
    """Return arguments of ``w13_kernel``."""
    if parameters is None:
        return {"LIMIT": None, "ALPHA": None, "BETA": None}
    limit = None if parameters.limit == inf else parameters.limit
    return {"LIMIT": limit, "ALPHA": parameters.alpha, "BETA": parameters.beta}


def _bits(widths: frozenset[int]) -> int:
    """Return widths as a set of bits."""
    return sum(1 << bits for bits in widths)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


@cache
def _sm_count(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
