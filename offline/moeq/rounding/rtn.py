"""Round to nearest on a grid whose range is searched for the least squared error."""

import torch

from moeq.rounding.grid import Grid, QuantizedWeight

_CHUNK = 1 << 18
"""Weights searched at once: few enough for the temporaries to stay in a core's cache, many enough
for the overhead of torch's calls not to matter."""


def quantize_rtn(weight: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Quantize a matrix by rounding each weight to the nearest point of its group's grid.

    Each group of ``group_size`` weights of a row gets the float16 scale and the zero
    point with the least squared error among ranges that differ at both ends, refined by least
    squares. The scale is rounded to float16 BEFORE codes are chosen, so codes are nearest to what
    is really stored.

    Args:
        weight: [N, K], any floating type; K is a multiple of ``group_size``.
        bits: Width, one of the format's.
        group_size: Weights of a row that share a grid.

    Raises:
        ValueError: The weights are not finite, or too large for float16 scales.
    """
    rows, columns = weight.shape
    groups = weight.reshape(-1, group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    scale, zero = torch.empty(2, len(groups))
    step = max(1, _CHUNK // group_size)
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        values = groups[part].float()
        grid = Grid.searched(values, bits)
        codes[part] = grid.codes(values, bits).to(torch.uint8)
        scale[part], zero[part] = grid.scale.flatten(), grid.zero.flatten()
    return QuantizedWeight.of(
        codes.view(rows, columns), scale.view(rows, -1), zero.view(rows, -1), bits
    )
