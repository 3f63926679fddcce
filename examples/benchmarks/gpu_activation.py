"""SwiGLU as one Triton kernel, for contenders that would use vLLM's."""

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _silu_and_mul(out_ptr: Any, x_ptr: Any, columns: Any, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(x_ptr + row * 2 * columns + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * columns + columns + column, mask=inside, other=0.0)
    result = gate * tl.sigmoid(gate) * up.to(tl.float32)
    tl.store(out_ptr + row * columns + column, result.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    """Write silu(gate) * up of [M, 2 * columns] into [M, columns]; both contiguous."""
    rows, columns = out.shape
    _silu_and_mul[(rows, triton.cdiv(columns, _BLOCK))](out, x, columns, BLOCK=_BLOCK)
