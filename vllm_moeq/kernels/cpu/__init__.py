"""The CPU kernel: C++ for AVX-512-VNNI and AVX2, compiled at first use and called by ctypes.

``csrc/experts.h`` is a layer of experts, ``csrc/linear.h`` a dense one, ``csrc/layout.h`` their
weights in memory. ``build.py`` compiles, ``library.py`` declares the C interface, ``linear.py``
calls it for dense layers. This file is the kernel's row in the dispatch table.
"""

import ctypes
import logging
from functools import cache

import torch

from vllm_moeq import envs
from vllm_moeq.format import Projection
from vllm_moeq.kernels.call import SWIGLU, FusedExpertsCall, no_expert
from vllm_moeq.kernels.cpu import library, torch_ops
from vllm_moeq.kernels.cpu.build import BuildError
from vllm_moeq.kernels.layout import ExpertLayout, ExpertWeights

logger = logging.getLogger(__name__)


def unavailable(device: torch.device) -> str | None:
    """Return why the kernel cannot run on ``device``, or None if it can.

    Raises:
        ValueError: ``MOEQ_CPU_ISA`` or ``MOEQ_CPU_ACTIVATION`` has a wrong value.
    """
    if device.type != "cpu":
        return f"it computes on the CPU and the weights are on {device}"
    envs.cpu_activation()
    return _why_not_loaded()


@cache
def _why_not_loaded() -> str | None:
    try:
        library.load()
    except (BuildError, OSError) as error:  # OSError: the loader, or no cache folder
        logger.warning("no moeq CPU kernel, only slow torch code: %s", error)
        return str(error)
    return None


def prepare(weights: ExpertWeights, layout: ExpertLayout, activation: str) -> ExpertWeights:
    """Repack canonical weights into tiles.

    The tiles hold scales and zero points too: those come back as empty tensors.

    Args:
        weights: Canonical weights of the local experts.
        layout: Their sizes and widths.
        activation: Says whether gate and up alternate in the rows of w13.

    Raises:
        ValueError: Weights that do not fit the layout.
    """
    layout.check(weights)
    torch_ops.take_over(layout.kernel)
    alternating = activation == "swigluoai"
    half = torch.empty(0, dtype=torch.float16, device="cpu")
    byte = torch.empty(0, dtype=torch.uint8, device="cpu")
    return ExpertWeights(
        _repack(*weights[:3], layout, "w13", alternating),
        half,
        byte,
        _repack(*weights[3:], layout, "w2", False),
        half.clone(),
        byte.clone(),
    )


def _repack(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    layout: ExpertLayout,
    projection: Projection,
    alternating: bool,
) -> torch.Tensor:
    """Return the tiles of one projection of all experts; tiles of gate and up take turns."""
    functions = library.load()
    rows, columns = layout.shape(projection)
    streams = 2 if projection == "w13" and layout.gated else 1
    stream_rows = rows // streams
    packed, scale, zero_point = packed.contiguous(), scale.contiguous(), zero_point.contiguous()
    group_size, slots = layout.group_size, range(len(layout.slots))
    widths = [layout.bits_and_offset(projection, slot)[0] for slot in slots]
    sizes = [
        streams * functions.moeq_tiles_bytes(bits, group_size, stream_rows, columns)
        for bits in widths
    ]
    # Explicitly on the CPU: vLLM builds models under a default device.
    tiles = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    functions.moeq_use_huge_pages(tiles.data_ptr(), tiles.numel())
    target = tiles.data_ptr()  # of an expert
    for slot, bits, size in zip(slots, widths, sizes, strict=True):
        tile_bytes = functions.moeq_tiles_bytes(bits, group_size, 1, columns)
        for stream in range(streams):
            first, stride = (stream, streams) if alternating else (stream * stream_rows, 1)
            functions.moeq_repack(
                bits,
                group_size,
                columns,
                packed.data_ptr() + layout.span(projection, slot)[0],
                scale[slot].data_ptr(),
                zero_point[slot].data_ptr(),
                first,
                stride,
                stream_rows,
                target + stream * tile_bytes,
                streams,
            )
        target += size
    return tiles


def run(call: FusedExpertsCall) -> torch.Tensor:
    """Run the experts on weights from :func:`prepare`.

    Inside, activations are integers with a scale per token and group. Relative to float64 on the
    same weights the error of a layer is below 3e-4 (3e-3 in bfloat16, from its own rounding); with
    ``MOEQ_CPU_ACTIVATION=int8`` it is below 2.5e-2 for Gaussian tokens, and below 6e-2 with 1 % of
    the channels 20 times as large. A token with a NaN or an infinity gives NaN.

    Raises:
        ValueError: Unknown activation, an expert id that is no expert, or weights that were
            prepared for another kernel.
        MemoryError: There is not enough for the activations.
    """
    x, layout, activation = call.x, call.layout, call.activation
    if activation not in library.ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {list(library.ACTIVATIONS)}")
    number = library.ACTIVATIONS[activation]
    swiglu = {} if call.swiglu is None else call.swiglu._asdict()
    if activation == "silu" and call.swiglu != SWIGLU["silu"]:
        number = library.LIMITED_SILU
    tokens = x.contiguous() if x.dtype in library.DTYPES else x.float().contiguous()
    output = torch.empty_like(tokens)
    # Held here until the call is over: the structure has only their addresses.
    router_weight = call.routing.topk_weights.float().contiguous()
    ids = _int32(call.routing.topk_ids)
    expert_map = None if call.routing.expert_map is None else _int32(call.routing.expert_map)
    w13_bias, w2_bias = (_contiguous(bias, torch.float32) for bias in call.biases)
    arguments = library.Call(
        x=tokens.data_ptr(),
        out=output.data_ptr(),
        router_weight=router_weight.data_ptr(),
        expert_ids=ids.data_ptr(),
        expert_map=_address(expert_map),
        w13=call.weights.w13_packed.data_ptr(),
        w2=call.weights.w2_packed.data_ptr(),
        w13_bias=_address(w13_bias),
        w2_bias=_address(w2_bias),
        layout=call.layout_tensor.data_ptr(),
        hidden_size=x.shape[-1],
        w13_bytes=call.weights.w13_packed.nbytes,
        w2_bytes=call.weights.w2_packed.nbytes,
        map_size=0 if expert_map is None else expert_map.numel(),
        experts=len(layout.slots),
        tokens=ids.shape[0],
        top_k=ids.shape[1],
        dtype=library.DTYPES[tokens.dtype],
        activation=number,
        int8=envs.cpu_activation() == "int8",
        router_weight_on_input=call.apply_router_weight_on_input,
        **{f"swiglu_{name}": value for name, value in swiglu.items()},
    )
    status = library.load().moeq_fused_experts(ctypes.byref(arguments))
    if status == library.BAD_EXPERT_ID:
        raise no_expert(call)
    if status == library.BAD_SIZES:
        raise ValueError(
            f"{arguments.w13_bytes} + {arguments.w2_bytes} bytes of weights do not fit the layout; "
            "are the weights prepared for this kernel?"
        )
    if status == library.OUT_OF_MEMORY:
        raise MemoryError(f"not enough memory for the activations of {arguments.tokens} tokens")
    return output.to(x.dtype)


def _int32(ids: torch.Tensor) -> torch.Tensor:
    """Return ids in 32 bits; what does not fit stays too large, or below zero."""
    if ids.dtype != torch.int32:
        ids = ids.long().clamp(-1, torch.iinfo(torch.int32).max).int()
    return ids.contiguous()


def _contiguous(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
