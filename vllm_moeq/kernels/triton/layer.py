"""One fused MoE layer: five launches, or four where no choices need sorting."""

from collections.abc import Iterable
from functools import cache

import torch
import triton  # type: ignore[import-untyped]

from vllm_moeq.kernels.layout import ExpertLayout, ExpertWeights, check_inputs
from vllm_moeq.kernels.reference import ACTIVATIONS
from vllm_moeq.kernels.triton import gemm
from vllm_moeq.kernels.triton.planes import BLOCK_K, padded
from vllm_moeq.kernels.triton.rows import combine_kernel, route_kernel, sums_kernel
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
INTERPRETED = not isinstance(gemm.up_kernel, triton.JITFunction)
"""Whether ``TRITON_INTERPRET=1`` runs the kernels with numpy, on tensors of the CPU."""
_COLUMNS = 1024  # of a program that works row by row
_INTERPRETED_PROCESSORS = 8


def run(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weights: ExpertWeights,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    layout: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
    apply_router_weight_on_input: bool,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Run the experts on prepared weights; arguments as those of the op.

    ``tiles`` are others than those of the table, in order to compare them.

    Never waits for the device, and no size depends on the routing: safe in CUDA graphs. Equal
    inputs give equal bits.

    An expert id that is no expert is left out, as padding is: to notice it, the host would have to
    wait.

    Raises:
        ValueError: Unknown activation, tokens that are neither bfloat16 nor float16, or tensors
            whose sizes do not belong together.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {list(ACTIVATIONS)}")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"the triton kernel takes bfloat16 or float16, not {x.dtype}: choose one of them "
            "(--dtype), or MOEQ_KERNEL=reference"
        )
    check_inputs(x, topk_weights, topk_ids, w13_bias, w2_bias, layout)
    sizes = ExpertLayout.from_tensor(layout)
    if x.shape[-1] != sizes.hidden_size:
        raise ValueError(
            f"tokens {list(x.shape)} do not fit the layout, whose hidden_size is "
            f"{sizes.hidden_size}"
        )
    packed = PlaneWeights(*weights)
    tokens, top_k = topk_ids.shape
    chosen, experts = tokens * top_k, len(sizes.slots)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not chosen or not experts:
        return out.zero_()
    x, ids, router_weight = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    direct = is_direct(chosen, experts)
    if tiles is None:
        table = tuned_table(x.device, sizes.hidden_size, sizes.intermediate_size, experts)
        tiles = choose_tiles(chosen, experts, table)
    if direct:
        blocks, order, block_experts = chosen, None, None
    else:
        blocks = most_blocks(chosen, experts, tiles.block_m)
        order = ids.new_empty(blocks * tiles.block_m, dtype=torch.int32)
        block_experts = ids.new_empty(blocks, dtype=torch.int32)
    routing = {
        "ids_ptr": ids,
        "map_ptr": None if expert_map is None else expert_map.contiguous(),
        "known": experts if expert_map is None else expert_map.numel(),
        "MAPPED": expert_map is not None,
    }
    if not direct:
        route_kernel[(experts + 1,)](
            table_ptr=packed.table,
            order_ptr=order,
            block_ptr=block_experts,
            chosen=chosen,
            experts=experts,
            blocks_m=blocks,
            TABLE_COLUMNS=packed.table.shape[1],
            BLOCK_M=tiles.block_m,
            BINS=triton.next_power_of_2(experts + 1),
            BLOCK=_COLUMNS,
            **routing,
        )
    groups = padded(sizes.hidden_size, BLOCK_K) // sizes.group_size
    sums = x.new_empty((tokens, groups), dtype=torch.float32)
    sums_kernel[(tokens, triton.cdiv(groups * sizes.group_size, _COLUMNS))](
        x, sums, sizes.hidden_size, groups, GROUP_SIZE=sizes.group_size, BLOCK=_COLUMNS
    )
    common = {
        "table_ptr": packed.table,
        "order_ptr": order,
        "block_ptr": block_experts,
        "chosen": chosen,
        "blocks_m": blocks,
        "GROUP_SIZE": sizes.group_size,
        "DIRECT": direct,
        "PLAIN": INTERPRETED,
        **_tile_arguments(tiles),
        **routing,
    }
    inner = padded_intermediate(sizes)
    # What one program of the first product sums, up to a group.
    sum_size = min(sizes.group_size, tiles.block_n // 2 if sizes.gated else tiles.block_n)
    hidden = x.new_empty((chosen, inner))
    hidden_sums = x.new_empty((chosen, inner // sum_size), dtype=torch.float32)
    rows = packed.w13_scales.shape[-1]
    gemm.up_kernel[(rows // tiles.block_n * blocks,)](
        x_ptr=x,
        w_ptr=packed.w13,
        scale_ptr=packed.w13_scales,
        sums_ptr=sums,
        bias_ptr=_contiguous(w13_bias),
        router_weight_ptr=router_weight,
        hidden_ptr=hidden,
        hidden_sums_ptr=hidden_sums,
        N=rows,
        K=sizes.hidden_size,
        inner=sizes.intermediate_size,
        padded_inner=inner,
        top_k=top_k,
        WIDTH_SET=_set(slot.w13_bits for slot in sizes.slots),
        SUM_SIZE=sum_size,
        MASK_K=sizes.hidden_size % BLOCK_K != 0,
        ACTIVATION=activation,
        GATED=sizes.gated,
        BIAS=w13_bias is not None,
        ON_INPUT=apply_router_weight_on_input,
        **common,
    )
    rows = packed.w2_scales.shape[-1]
    busy = rows // tiles.block_n * min(chosen, blocks, max(experts, chosen // tiles.block_m))
    wanted = tiles.programs_per_processor * _processors(x.device)
    split = choose_split(busy, inner // BLOCK_K, wanted)
    parts = x.new_empty(
        (split, chosen, sizes.hidden_size), dtype=x.dtype if split == 1 else torch.float32
    )
    gemm.down_kernel[(rows // tiles.block_n * blocks, split)](
        hidden_ptr=hidden,
        w_ptr=packed.w2,
        scale_ptr=packed.w2_scales,
        sums_ptr=hidden_sums,
        bias_ptr=_contiguous(w2_bias),
        out_ptr=parts,
        N=rows,
        K=inner,
        outer=sizes.hidden_size,
        WIDTH_SET=_set(slot.w2_bits for slot in sizes.slots),
        SUM_SIZE=sum_size,
        BIAS=w2_bias is not None,
        SPLIT_K=split,
        **common,
    )
    combine_kernel[(tokens, triton.cdiv(sizes.hidden_size, _COLUMNS))](
        parts_ptr=parts,
        router_weight_ptr=router_weight,
        out_ptr=out,
        outer=sizes.hidden_size,
        chosen=chosen,
        top_k=top_k,
        ON_INPUT=apply_router_weight_on_input,
        SPLIT_K=split,
        BLOCK=_COLUMNS,
        **routing,
    )
    return out


def _tile_arguments(tiles: Tiles) -> dict[str, int]:
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCKS_TOGETHER": tiles.blocks_together,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _set(widths: Iterable[int]) -> int:
    """Return widths as a set of bits."""
    return sum(1 << bits for bits in set(widths))


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
