"""Symmetric grids in the tensors of compressed-tensors: how dense linear layers are rounded.

Scales are values of bfloat16 that float16 has, too: vLLM's kernels take them in the type of the
model, ours in float16, and neither rounds them again.
"""

from typing import NamedTuple

import torch

from moeq.rounding.gptq import Hessian, Refinement, feed_back, refine
from moeq.rounding.grid import chunks, in_groups, largest_code, nearest_codes
from vllm_moeq.format import LINEAR_TENSORS, pack, spread, unpack

_SHARES = {4: (0.6, 17), 8: (0.9, 9)}
"""Per width: the smallest share of a group's extreme that its grid may end at, and how many shares
up to 1 are tried."""
_FITS = 2
_SMALLEST_SCALE = 2.0**-24
_LARGEST_SCALE = 65280.0
_REFINEMENT = Refinement(scales=False)


class LinearWeight(NamedTuple):
    """A weight matrix [N, K] in the three tensors of ``pack-quantized``."""

    packed: torch.Tensor
    scale: torch.Tensor
    shape: torch.Tensor

    @classmethod
    def of(cls, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> "LinearWeight":
        """Store codes [N, K] of any type with scales [N, K / group_size]."""
        return cls(
            pack(codes.to(torch.uint8), bits).view(torch.int32),
            scale.to(torch.bfloat16).contiguous(),
            torch.tensor(codes.shape, dtype=torch.int64),
        )

    def dequantize(self, bits: int) -> torch.Tensor:
        """Return the weights float32 [N, K]."""
        codes = unpack(self.packed.view(torch.uint8), bits).float()
        rows, columns = codes.shape
        group_size = columns // self.scale.shape[1]
        return (codes - _zero(bits)) * spread(self.scale.float(), group_size, columns)

    def to(self, device: torch.device | str) -> "LinearWeight":
        """Return it on another device."""
        return LinearWeight(*(tensor.to(device) for tensor in self))

    @classmethod
    def names(cls, weight: str) -> tuple[str, ...]:
        """Return the names of the three tensors that replace the tensor ``weight`` on disk."""
        stem = weight.removesuffix("weight")
        return tuple(stem + name for name in LINEAR_TENSORS)

    def named(self, weight: str) -> dict[str, torch.Tensor]:
        """Return the three tensors by :meth:`names`."""
        return dict(zip(self.names(weight), self, strict=True))


def round_linear(weight: torch.Tensor, bits: int, group_size: int) -> LinearWeight:
    """Round each weight of a matrix to the nearest point of its group's grid.

    Args:
        weight: [N, K], any floating type; K is a multiple of the group size.
        bits: 4 or 8.
        group_size: Weights of a row that share a scale.

    Raises:
        ValueError: The weights are not finite, or too large for float16 scales.
    """
    weight = weight.float()
    scale = _scales(weight, bits, group_size)
    step = spread(scale, group_size, weight.shape[1])
    zero = torch.full_like(step[:1, :1], _zero(bits))
    return LinearWeight.of(nearest_codes(weight, step, zero, bits), scale, bits)


def round_linear_by_inputs(
    weight: torch.Tensor, hessian: Hessian, bits: int, group_size: int
) -> LinearWeight:
    """Round a matrix with GPTQ, so that its outputs on the calibration inputs change least.

    Args:
        weight: As in :func:`round_linear`.
        hessian: Of its inputs, a batch of one.
        bits: 4 or 8.
        group_size: Weights of a row that share a scale.

    Raises:
        ValueError: As :func:`round_linear`.
    """
    weight = weight.float()
    importance = hessian.damped[0].diagonal().expand_as(weight)
    scale = _scales(weight, bits, group_size, importance).T[None].contiguous()
    zero = torch.full_like(scale, _zero(bits))
    transposed = weight.T[None].contiguous()
    codes = feed_back(transposed, hessian, scale, zero, bits, group_size, _REFINEMENT.in_feedback)
    refine(transposed, hessian.damped, codes, scale, zero, bits, group_size, _REFINEMENT)
    return LinearWeight.of(codes[0].T, scale[0].T, bits)


def _zero(bits: int) -> int:
    return 1 << (bits - 1)


def _scales(
    weight: torch.Tensor, bits: int, group_size: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the scales [N, K / group_size] of least squared error, weighted by importance."""
    rows = len(weight)
    (groups,) = in_groups(weight, group_size)
    (squares,) = (None,) if importance is None else in_groups(importance, group_size)
    scales = [
        _searched(groups[part], bits, None if squares is None else squares[part])
        for part in chunks(groups)
    ]
    return torch.cat(scales).view(rows, -1)


def _searched(groups: torch.Tensor, bits: int, importance: torch.Tensor | None) -> torch.Tensor:
    zero = float(_zero(bits))
    largest = torch.maximum(
        groups.amin(-1, keepdim=True) / -zero, groups.amax(-1, keepdim=True) / (zero - 1)
    )
    if not largest.abs().max().item() <= _LARGEST_SCALE:  # also true for NaN
        raise ValueError("weights are NaN, infinite, or too large for float16 scales")

    def codes(scale: torch.Tensor) -> torch.Tensor:
        steps = (groups / scale).round_()
        return steps.clamp_(-zero, largest_code(bits) - zero)

    def error(scale: torch.Tensor) -> torch.Tensor:
        squares = (codes(scale) * scale - groups).square_()
        if importance is not None:
            squares *= importance
        return squares.sum(-1, keepdim=True)

    best = _storable(largest)
    least = error(best)

    def improve(scale: torch.Tensor) -> None:
        nonlocal best, least
        other = error(scale)
        better = other < least
        best, least = torch.where(better, scale, best), torch.where(better, other, least)

    first, count = _SHARES[bits]
    for share in torch.linspace(first, 1.0, count)[:-1].tolist():
        improve(_storable(largest * share))
    for _ in range(_FITS):  # least squares for the codes of the best
        chosen = codes(best)
        weighted = chosen if importance is None else chosen * importance
        squares = (weighted * chosen).sum(-1, keepdim=True)
        fitted = (weighted * groups).sum(-1, keepdim=True) / squares.clamp(min=1e-30)
        improve(_storable(torch.where(squares > 0, fitted, best)))
    return best


def _storable(scale: torch.Tensor) -> torch.Tensor:
    """Return the nearest scales that are values of both float16 and bfloat16."""
    scale = scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)
    return scale.to(torch.bfloat16).float()
