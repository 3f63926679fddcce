"""Round to nearest on a grid whose range is searched for the least squared error."""

from typing import NamedTuple

import torch

from vllm_moeq.format import dequantize, pack

_SHRINK = {1: (0.2, 0.6, 9), 2: (0.4, 1.0, 13), 3: (0.55, 1.0, 10), 4: (0.65, 1.0, 8)}
"""Per width: smallest and largest share of a group's range that the grid spans, and steps."""
_REFINEMENTS = 3
_CHUNK = 1 << 17
"""Weights searched at once: few enough for the temporaries to stay in a core's cache."""
_SMALLEST_SCALE = 2.0**-24
_LARGEST_SCALE = 65504.0
_LARGEST_ZERO_POINT = 255


class QuantizedWeight(NamedTuple):
    """A weight matrix [N, K] in the three tensors of the checkpoint format."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def dequantize(self, bits: int) -> torch.Tensor:
        """Return the weights float32 [N, K]."""
        return dequantize(self.packed, self.scale, self.zero_point, bits)


def quantize_rtn(weight: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Quantize a matrix by rounding each weight to the nearest point of its group's grid.

    Each group of ``group_size`` weights of a row gets the float16 scale and the half-step zero
    point with the least squared error among several ranges, refined by least squares. The scale
    is rounded to float16 BEFORE codes are chosen, so codes are nearest to what is really stored.

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
    scale = torch.empty(len(groups), dtype=torch.float16)
    zero_point = torch.empty(len(groups), dtype=torch.uint8)
    step = max(1, _CHUNK // group_size)
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        codes[part], scale[part], zero_point[part] = _quantize_groups(groups[part].float(), bits)
    return QuantizedWeight(
        pack(codes.view(rows, columns), bits), scale.view(rows, -1), zero_point.view(rows, -1)
    )


def _quantize_groups(
    groups: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [n, G], scale [n] and zero point [n] of float32 groups [n, G]."""
    levels = (1 << bits) - 1
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    largest = (high - low).max().item()
    if not largest <= _LARGEST_SCALE * levels:  # also true for NaN
        raise ValueError("weights are NaN, infinite, or too large for float16 scales")
    # A zero point reaches only half of the 8-bit codes. A grid that leans to the negative side
    # is stored mirrored, by a negative scale.
    sign = torch.where(-low > high, -1.0, 1.0)
    groups = groups * sign
    low, high = torch.where(sign < 0, -high, low), torch.where(sign < 0, -low, high)

    smallest, widest, steps = _SHRINK.get(bits, (0.9, 1.0, 3))
    best = _Grid.between(groups, low * widest, high * widest, levels)
    for shrink in torch.linspace(widest, smallest, steps).tolist()[1:]:
        best = best.better(_Grid.between(groups, low * shrink, high * shrink, levels))
    for _ in range(_REFINEMENTS):
        best = best.better(_Grid.fitted(groups, best.codes, levels))
    scale = (best.scale * sign).to(torch.float16)
    return best.codes.to(torch.uint8), scale.flatten(), best.zero_point.to(torch.uint8).flatten()


class _Grid(NamedTuple):
    """One grid per group, with the codes and the squared error that it leads to."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    codes: torch.Tensor
    error: torch.Tensor

    @classmethod
    def between(
        cls, groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int
    ) -> "_Grid":
        """Span ``levels`` steps from ``low`` to ``high``, as nearly as the format allows."""
        scale = ((high - low) / levels).clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
        scale = scale.to(torch.float16).float()
        zero_point = (low * -2 / scale).round_().clamp_(0, _LARGEST_ZERO_POINT)
        half = zero_point / 2
        codes = (groups / scale).add_(half).round_().clamp_(0, levels)
        error = (codes - half).mul_(scale).sub_(groups).square_().sum(-1, keepdim=True)
        return cls(scale, zero_point, codes, error)

    @classmethod
    def fitted(cls, groups: torch.Tensor, codes: torch.Tensor, levels: int) -> "_Grid":
        """Fit scale and zero point to given codes by least squares, then choose codes anew."""
        mean_code = codes.mean(-1, keepdim=True)
        mean = groups.mean(-1, keepdim=True)
        centred = codes - mean_code
        variance = centred.square().sum(-1, keepdim=True)
        scale = (centred * groups).sum(-1, keepdim=True) / variance.clamp(min=1e-12)
        low = mean - scale * mean_code
        return cls.between(groups, low, low + scale * levels, levels)

    def better(self, other: "_Grid") -> "_Grid":
        """Return, group by group, the grid with the smaller error."""
        wins = other.error < self.error
        return _Grid(*(torch.where(wins, new, old) for old, new in zip(self, other, strict=True)))
