"""Round to nearest on a grid whose range is searched for the least squared error."""

import torch

from moeq.rounding.grid import QuantizedWeight, nearest_codes, round_groups
from moeq.rounding.groups import search_alone


def quantize_rtn(weight: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Quantize a matrix by rounding each weight to the nearest point of its group's grid.

    Each group of ``group_size`` weights of a row gets the float16 scale and the zero
    point with the least squared error among ranges that differ at both ends, refined by least
    squares. The scale is rounded to float16 BEFORE codes are chosen, so codes are nearest to what
    is really stored.

    Args:
        weight: [N, K], any floating type; K is a multiple of 8.
        bits: Width, one of the format's.
        group_size: Weights of a row that share a grid; the last group may be shorter.

    Raises:
        ValueError: The weights are not finite, or too large for float16 scales.
    """

    def choose(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale, zero = search_alone(groups, bits)
        return nearest_codes(groups, scale, zero, bits), scale, zero

    return round_groups(weight, bits, group_size, choose)
