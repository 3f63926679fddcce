"""A process that runs Triton kernels with numpy, so that they are tested without a GPU.

Triton decides when it is imported whether it compiles or interprets, hence the process.
"""

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest
import torch


@contextmanager
def triton_interpreter() -> Iterator[Executor]:
    """Start the process; give it functions of modules to run."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("OMP_NUM_THREADS", "1")
            pool.submit(_fill_new_memory).result()  # starts it with this environment
        yield pool


def _fill_new_memory() -> None:
    """Let what kernels allocate start as NaN or nonsense."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)


def round_columns(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Run GPTQ's first loop over columns."""
    from moeq.rounding import columns

    assert columns.in_triton(torch.device("cpu"))
    return columns.round_columns(*arguments)


def triton_block() -> int:
    """Return how many columns a program of these loops holds."""
    from vllm_moeq.kernels.triton import columns

    return columns.BLOCK


def descend(
    hessian: torch.Tensor,
    scale: torch.Tensor,
    codes: torch.Tensor,
    gradient: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run GPTQ's other loop over columns; return the codes and the gradient."""
    from moeq.rounding import columns

    assert columns.in_triton(torch.device("cpu"))
    columns.descend(hessian, scale, codes, gradient, bits)
    return codes, gradient


def route(
    topk_ids: torch.Tensor,
    turns: torch.Tensor,
    block_m: int,
    expert_map: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Run the kernel that sorts choices by expert.

    Args:
        topk_ids: [M, top_k].
        turns: Place of each expert in the order of work.
        block_m: Choices of a block.
        expert_map: As the op has it.
    """
    import triton

    from vllm_moeq.kernels.triton.routing import route_kernel
    from vllm_moeq.kernels.triton.tiles import most_blocks

    chosen, experts = topk_ids.numel(), len(turns)
    blocks = most_blocks(chosen, experts, block_m)
    # More than the kernel may write, to see that it does not.
    order = torch.full((blocks * block_m + 7,), -77, dtype=torch.int32)
    block_experts = torch.full((blocks + 7,), -77, dtype=torch.int32)
    route_kernel[(experts + 1,)](
        ids_ptr=topk_ids,
        map_ptr=expert_map,
        num_experts=experts if expert_map is None else len(expert_map),
        table_ptr=turns.int(),
        sorted_ptr=order,
        block_experts_ptr=block_experts,
        num_choices=chosen,
        local_experts=experts,
        blocks_m=blocks,
        MAPPED=expert_map is not None,
        TABLE_COLUMNS=1,
        BLOCK_M=block_m,
        BINS=triton.next_power_of_2(experts + 1),
        BLOCK=64,
    )
    return {"order": order, "block_experts": block_experts, "blocks": blocks}
