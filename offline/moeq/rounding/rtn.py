"""Round to nearest on a grid whose range is searched for the least squared error."""

import functools
import itertools
from typing import NamedTuple

import torch

from vllm_moeq.format import dequantize, pack, zero_point_unit

_SHARES = {1: (0.15, 5), 2: (0.3, 5), 3: (0.5, 5), 4: (0.7, 5), 8: (0.9, 3)}
"""Per width: the smallest share of a group's extreme that either end of a grid is tried at, and
how many shares up to 1 are tried; every pair of ends is one range."""
_REFINEMENTS = 2
_CHUNK = 1 << 18
"""Weights searched at once: few enough for the temporaries to stay in a core's cache, many enough
for the overhead of torch's calls not to matter."""
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
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    largest = (high - low).max().item()
    if not largest <= _LARGEST_SCALE * _largest_code(bits):  # also true for NaN
        raise ValueError("weights are NaN, infinite, or too large for float16 scales")
    shares = torch.linspace(1.0, *_SHARES[bits]).tolist()
    best = functools.reduce(
        _Grid.better,
        (
            _Grid.between(groups, low * low_share, high * high_share, bits)
            for low_share, high_share in itertools.product(shares, repeat=2)
        ),
    )
    for _ in range(_REFINEMENTS):
        best = best.better(_Grid.fitted(groups, best.codes(groups, bits), bits))
    codes = best.codes(groups, bits).to(torch.uint8)
    zero_point = best.zero / zero_point_unit(bits)
    return codes, best.scale.to(torch.float16).flatten(), zero_point.to(torch.uint8).flatten()


class _Grid(NamedTuple):
    """One grid per group, its zero in codes, with the squared error that it leads to."""

    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor

    @classmethod
    def between(
        cls, groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int
    ) -> "_Grid":
        """Lay the codes from ``low`` to ``high``, as nearly as the format allows."""
        largest = _largest_code(bits)
        scale = ((high - low) / largest).clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
        scale = scale.to(torch.float16).float()
        unit = zero_point_unit(bits)
        zero = (low / (-unit * scale)).round_().clamp_(0, _LARGEST_ZERO_POINT).mul_(unit)
        steps = (groups / scale).add_(zero)
        deviation = steps.round().clamp_(0, largest).sub_(steps)
        return cls(scale, zero, deviation.square_().sum(-1, keepdim=True) * scale.square())

    @classmethod
    def fitted(cls, groups: torch.Tensor, codes: torch.Tensor, bits: int) -> "_Grid":
        """Fit scale and zero point to given codes by least squares."""
        mean_code = codes.mean(-1, keepdim=True)
        mean = groups.mean(-1, keepdim=True)
        centred = codes - mean_code
        variance = centred.square().sum(-1, keepdim=True)
        scale = (centred * groups).sum(-1, keepdim=True) / variance.clamp(min=1e-12)
        low = mean - scale * mean_code
        return cls.between(groups, low, low + scale * _largest_code(bits), bits)

    def codes(self, groups: torch.Tensor, bits: int) -> torch.Tensor:
        """Return the code of each weight, still as a float: the grid point nearest to it."""
        return (groups / self.scale).add_(self.zero).round_().clamp_(0, _largest_code(bits))

    def better(self, other: "_Grid") -> "_Grid":
        """Return, group by group, the grid with the smaller error."""
        wins = other.error < self.error
        return _Grid(*(torch.where(wins, new, old) for old, new in zip(self, other, strict=True)))


def _largest_code(bits: int) -> int:
    return (1 << bits) - 1
