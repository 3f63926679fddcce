"""Dense linear layers on the CPU: tiles like those of an expert, without an activation."""

import ctypes

import torch

from vllm_moeq import envs
from vllm_moeq.kernels.cpu import library, torch_ops
from vllm_moeq.kernels.linear import SYMMETRIC_ZERO_POINT, LinearCall, LinearLayout, LinearWeight


def prepare(weight: LinearWeight, layout: LinearLayout) -> LinearWeight:
    """Repack canonical weights into tiles, which hold the scales too: those come back empty.

    Raises:
        ValueError: Weights that do not fit the layout.
    """
    layout.check()
    torch_ops.take_over(layout.kernel)
    functions = library.load()
    bits, group_size, rows, columns = layout[:4]
    shapes = [rows, columns * bits // 32], [rows, columns // group_size]
    if weight.packed.dtype != torch.int32 or [*map(list, (w.shape for w in weight))] != [*shapes]:
        raise ValueError(
            f"weights {[list(tensor.shape) for tensor in weight]} do not fit the layout, which has "
            f"{list(shapes)}"
        )
    packed, scale = weight.packed.contiguous(), weight.scale.half().contiguous()
    zero_point = torch.full(scale.shape, SYMMETRIC_ZERO_POINT, dtype=torch.uint8, device="cpu")
    size = functions.moeq_tiles_bytes(bits, group_size, rows, columns)
    tiles = torch.empty(size, dtype=torch.uint8, device="cpu")
    functions.moeq_use_huge_pages(tiles.data_ptr(), size)
    functions.moeq_repack(
        bits, group_size, columns, packed.data_ptr(), scale.data_ptr(), zero_point.data_ptr(),
        0, 1, rows, tiles.data_ptr(), 1,
    )  # fmt: skip
    return LinearWeight(tiles, weight.scale.new_empty(0))


def run(call: LinearCall) -> torch.Tensor:
    """Multiply with weights from :func:`prepare`.

    Activations are integers inside, as those of the experts: the errors are about the same. A token
    with a NaN or an infinity gives NaN.

    Raises:
        ValueError: Weights that were prepared for another kernel.
        MemoryError: There is not enough for the activations.
    """
    x, (tiles, _), layout = call.x, call.weight, call.layout
    tokens = x.contiguous() if x.dtype in library.DTYPES else x.float().contiguous()
    output = tokens.new_empty(*x.shape[:-1], layout.rows)
    # Held here until the call is over: the structure has only its address.
    bias = None if call.bias is None else call.bias.float().contiguous()
    arguments = library.LinearCall(
        x=tokens.data_ptr(),
        out=output.data_ptr(),
        tiles=tiles.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        tiles_bytes=tiles.nbytes,
        rows=layout.rows,
        columns=layout.columns,
        tokens=tokens.numel() // layout.columns,
        bits=layout.bits,
        group_size=layout.group_size,
        dtype=library.DTYPES[tokens.dtype],
        int8=envs.cpu_activation() == "int8",
    )
    status = library.load().moeq_linear(ctypes.byref(arguments))
    if status == library.BAD_SIZES:
        raise ValueError(
            f"{tiles.nbytes} bytes of weights do not fit the layout; are the weights prepared for "
            "this kernel?"
        )
    if status == library.OUT_OF_MEMORY:
        raise MemoryError(f"not enough memory for the activations of {arguments.tokens} tokens")
    return output.to(x.dtype)
