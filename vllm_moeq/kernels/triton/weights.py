"""Brings canonical weights into the planes of the Triton kernel, once after loading."""

from typing import NamedTuple

import torch

from vllm_moeq.format import PROJECTIONS, Projection
from vllm_moeq.kernels.layout import ExpertLayout, ExpertWeights
from vllm_moeq.kernels.triton.planes import (
    ALIGNMENT,
    BLOCK_K,
    BLOCK_N,
    matrix_words,
    pack_planes,
    pack_scales,
    padded,
)

_SLAB = 8
"""Rows of gate that stand before as many of up: one thread of the tensor cores gets both."""


class PlaneWeights(NamedTuple):
    """Weights as ``gemm.py`` reads them; as many tensors as ``ExpertWeights``.

    Attributes:
        w13: int16, planes of all experts.
        w13_scales: int32 [experts, groups, rows]: scale and zero point.
        table: int32 [experts, 5]: width and offset of w13, of w2, place in the order of work.
        w2: As w13.
        w2_scales: As w13_scales.
        unused: Empty.
    """

    w13: torch.Tensor
    w13_scales: torch.Tensor
    table: torch.Tensor
    w2: torch.Tensor
    w2_scales: torch.Tensor
    unused: torch.Tensor


def prepare(weights: ExpertWeights, layout: ExpertLayout, activation: str) -> PlaneWeights:
    """Repack canonical weights on the device where they are.

    Args:
        weights: Canonical weights of the local experts.
        layout: Their sizes and widths.
        activation: Says whether gate and up alternate in the rows of w13.
    """
    device = weights.w13_packed.device
    orders = {
        "w13": _w13_row_order(layout, activation == "swigluoai").to(device),
        "w2": _row_order(layout.hidden_size, padded(layout.hidden_size, BLOCK_N)).to(device),
    }
    w13, w13_scales = _repack(*weights[:3], layout, "w13", orders["w13"])
    w2, w2_scales = _repack(*weights[3:], layout, "w2", orders["w2"])
    return PlaneWeights(w13, w13_scales, _table(layout).to(device), w2, w2_scales, w2.new_empty(0))


def padded_intermediate(layout: ExpertLayout) -> int:
    """Return the columns of w2 with those of weights that are zero.

    Rows of w13 are padded to the same size, so that all of them are written.
    """
    return padded(layout.intermediate_size, BLOCK_K)


def _row_order(rows: int, size: int) -> torch.Tensor:
    """Return all rows and then the row of zeros, whose number is ``rows``."""
    return torch.arange(size, device="cpu").clamp(max=rows)


def _w13_row_order(layout: ExpertLayout, alternating: bool) -> torch.Tensor:
    size, rows = padded_intermediate(layout), layout.w13_rows
    if not layout.gated:
        return _row_order(rows, size)
    column = torch.arange(size, device="cpu")
    if alternating:
        gate, up = 2 * column, 2 * column + 1
    else:
        gate, up = column, column + layout.intermediate_size
    pairs = torch.stack((gate, up)).masked_fill(column >= layout.intermediate_size, rows)
    return pairs.view(2, -1, _SLAB).transpose(0, 1).flatten()


def _sizes(layout: ExpertLayout, projection: Projection) -> tuple[int, int]:
    rows, columns = layout.shape(projection)
    if projection == "w13":
        rows = padded_intermediate(layout) * (2 if layout.gated else 1)
    return padded(rows, BLOCK_N), padded(columns, BLOCK_K)


def _words(layout: ExpertLayout, projection: Projection) -> list[int]:
    """Return the 16-bit words of each expert."""
    shape = _sizes(layout, projection)
    return [
        matrix_words(*shape, layout.bits_and_offset(projection, slot)[0])
        for slot in range(len(layout.slots))
    ]


def _repack(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    layout: ExpertLayout,
    projection: Projection,
    row_order: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    device = packed.device
    rows, _ = layout.shape(projection)
    padded_rows, padded_columns = _sizes(layout, projection)
    words = _words(layout, projection)
    groups = padded_columns // layout.group_size
    planes = torch.empty(sum(words), dtype=torch.int16, device=device)
    scales = torch.empty((len(layout.slots), groups, padded_rows), dtype=torch.int32, device=device)
    for slot, target in enumerate(torch.split(planes, words)):
        bits, _ = layout.bits_and_offset(projection, slot)
        first, size = layout.span(projection, slot)
        matrix = packed[first : first + size].view(rows, -1)
        pack_planes(matrix, bits, row_order, target)
        scales[slot] = pack_scales(scale[slot], zero_point[slot], bits, row_order, groups)
    return planes, scales


def _table(layout: ExpertLayout) -> torch.Tensor:
    columns: list[list[int]] = []
    for projection in PROJECTIONS:
        words = _words(layout, projection)
        bits = [layout.bits_and_offset(projection, slot)[0] for slot in range(len(words))]
        offsets = [2 * sum(words[:slot]) // ALIGNMENT for slot in range(len(words))]
        columns += [bits, offsets]
    # Widest first: the last programs to start should be short ones.
    widest = sorted(range(len(layout.slots)), key=lambda slot: -columns[0][slot] - columns[2][slot])
    turns = [0] * len(widest)
    for turn, slot in enumerate(widest):
        turns[slot] = turn
    return torch.tensor([*columns, turns], dtype=torch.int32, device="cpu").t().contiguous()
