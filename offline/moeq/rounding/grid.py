"""The grid of a group: a float16 scale and a stored zero point, searched for the least error."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from vllm_moeq.format import dequantize, pack, zero_point_unit

_SHARES = {1: (0.15, 5), 2: (0.3, 5), 3: (0.5, 5), 4: (0.7, 5), 8: (0.9, 3)}
"""Per width: the smallest share of a group's extreme that either end of a grid is tried at, and
how many shares up to 1 are tried; every pair of ends is one range."""
_REFINEMENTS = 2
IMPOSSIBLE = "weights are NaN, infinite, or too large for float16 scales"
_SMALLEST_SCALE = 2.0**-24
_LARGEST_SCALE = 65504.0
_LARGEST_ZERO_POINT = 255
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 26
"""Weights that are searched at once: on a CPU what stays in a core's cache, 8 times as fast as a
large matrix at once; on a GPU enough to keep it busy."""


class QuantizedWeight(NamedTuple):
    """A weight matrix [N, K] in the three tensors of the checkpoint format."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    @classmethod
    def of(
        cls, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
    ) -> "QuantizedWeight":
        """Store codes [N, K] on grids [N, groups] that the format can store.

        Args:
            codes: Any type.
            scale: Float.
            zero: Float, in codes.
            bits: Width of the codes.
        """
        return cls(
            pack(codes.to(torch.uint8), bits),
            scale.to(torch.float16),
            (zero / zero_point_unit(bits)).to(torch.uint8),
        )

    def dequantize(self, bits: int, group_size: int) -> torch.Tensor:
        """Return the weights float32 [N, K]."""
        return dequantize(self.packed, self.scale, self.zero_point, bits, group_size)

    def parts(self, count: int) -> list["QuantizedWeight"]:
        """Take apart matrices that were rounded one above the other; they come to the CPU."""
        chunks = (tensor.chunk(count) for tensor in self)
        return [
            QuantizedWeight(*(tensor.cpu().contiguous() for tensor in part))
            for part in zip(*chunks, strict=True)
        ]

    @classmethod
    def names(cls, weight: str) -> tuple[str, ...]:
        """Return the names of the three tensors that replace the tensor ``weight`` on disk."""
        stem = weight.removesuffix(".weight")
        return tuple(f"{stem}.weight_{kind}" for kind in cls._fields)

    def named(self, weight: str) -> dict[str, torch.Tensor]:
        """Return the three tensors by :meth:`names`."""
        return dict(zip(self.names(weight), self, strict=True))


class Grid(NamedTuple):
    """One grid per group, its zero in codes, with the squared error that it leads to.

    All tensors are float32 [n, 1]; the values are those that the format can store.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor

    @classmethod
    def searched(
        cls, groups: torch.Tensor, bits: int, importance: torch.Tensor | None = None
    ) -> "Grid":
        """Find the grid with the least squared error among ranges that differ at both ends.

        The best of them is refined by least squares.

        Args:
            groups: float32 [n, G].
            bits: Width of the codes.
            importance: Weights of the squared errors [n, G].

        Raises:
            ValueError: The weights are not finite, or too large for float16 scales.
        """
        grids = [
            cls._searched(groups[part], bits, None if importance is None else importance[part])
            for part in chunks(groups)
        ]
        return cls(*(torch.cat(values) for values in zip(*grids, strict=True)))

    @classmethod
    def _searched(cls, groups: torch.Tensor, bits: int, importance: torch.Tensor | None) -> "Grid":
        low = groups.amin(-1, keepdim=True).clamp(max=0)
        high = groups.amax(-1, keepdim=True).clamp(min=0)
        largest = (high - low).max().item()
        if not largest <= _LARGEST_SCALE * largest_code(bits):  # also true for NaN
            raise ValueError(IMPOSSIBLE)
        shares = search_shares(bits)
        best = functools.reduce(
            cls.better,
            (
                cls.between(groups, low * low_share, high * high_share, bits, importance)
                for low_share, high_share in itertools.product(shares, repeat=2)
            ),
        )
        for _ in range(_REFINEMENTS):
            codes = best.codes(groups, bits)
            best = best.better(cls.fitted(groups, codes, bits, importance))
        return best

    @classmethod
    def between(
        cls,
        groups: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        bits: int,
        importance: torch.Tensor | None = None,
    ) -> "Grid":
        """Lay the codes from ``low`` to ``high``, as nearly as the format allows."""
        scale, zero = storable((high - low) / largest_code(bits), low, bits)
        steps = (groups / scale).add_(zero)
        error = steps.round().clamp_(0, largest_code(bits)).sub_(steps).square_()
        if importance is not None:
            error *= importance
        return cls(scale, zero, error.sum(-1, keepdim=True) * scale.square())

    @classmethod
    def fitted(
        cls,
        groups: torch.Tensor,
        codes: torch.Tensor,
        bits: int,
        importance: torch.Tensor | None = None,
    ) -> "Grid":
        """Fit scale and zero point to given codes by least squares."""
        weights = torch.ones_like(codes) if importance is None else importance.expand_as(codes)
        total = weights.sum(-1, keepdim=True).clamp(min=1e-30)
        mean_code = (weights * codes).sum(-1, keepdim=True) / total
        mean = (weights * groups).sum(-1, keepdim=True) / total
        centred = codes - mean_code
        weighted = weights * centred
        variance = (weighted * centred).sum(-1, keepdim=True) / total
        scale = (weighted * groups).sum(-1, keepdim=True) / total / variance.clamp(min=1e-12)
        low = mean - scale * mean_code
        return cls.between(groups, low, low + scale * largest_code(bits), bits, importance)

    def codes(self, groups: torch.Tensor, bits: int) -> torch.Tensor:
        """Return the code of each weight, still as a float: the grid point nearest to it."""
        return nearest_codes(groups, self.scale, self.zero, bits)

    def better(self, other: "Grid") -> "Grid":
        """Return, group by group, the grid with the smaller error."""
        wins = other.error < self.error
        return Grid(*(torch.where(wins, new, old) for old, new in zip(self, other, strict=True)))


def search_shares(bits: int) -> list[float]:
    """Return the shares of a group's extremes that either end of its grid is tried at."""
    return torch.linspace(1.0, *_SHARES[bits]).tolist()


def chunks(groups: torch.Tensor) -> Iterator[slice]:
    """Yield rows of groups [n, G] that are best worked on at once."""
    size = _CPU_CHUNK if groups.device.type == "cpu" else _GPU_CHUNK
    step = max(1, size // groups.shape[1])
    for start in range(0, len(groups), step):
        yield slice(start, start + step)


def round_groups(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    choose: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> QuantizedWeight:
    """Quantize a matrix whose groups have nothing to do with each other.

    Args:
        weight: [N, K], any floating type; K is a multiple of 8.
        bits: Width, one of the format's.
        group_size: Weights of a row that share a grid; the last group may be shorter.
        choose: From float32 groups [n, G] to their codes [n, G], scales [n, 1], and zeros in codes
            [n, 1].
    """
    rows = len(weight)
    parts_of_rows = []
    for groups in in_groups(weight, group_size):
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
        scale, zero = torch.empty(2, len(groups), 1, device=weight.device)
        for part in chunks(groups):
            codes[part], scale[part], zero[part] = choose(groups[part].float())
        parts_of_rows.append([values.view(rows, -1) for values in (codes, scale, zero)])
    codes, scale, zero = (torch.cat(parts, 1) for parts in zip(*parts_of_rows, strict=True))
    return QuantizedWeight.of(codes, scale, zero, bits)


def in_groups(rows: torch.Tensor, group_size: int) -> Iterator[torch.Tensor]:
    """Yield the groups of rows [..., K] as [n, G]: the whole ones, and the short last ones."""
    whole = rows.shape[-1] // group_size * group_size
    for part in (rows[..., :whole], rows[..., whole:]):
        if part.shape[-1]:
            yield part.reshape(-1, min(group_size, part.shape[-1]))


def storable(
    scale: torch.Tensor, low: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero (in codes) that the format can store, code 0 being near ``low``.

    Args:
        scale: Float; values below the smallest float16 become that.
        low: Value of code 0.
        bits: Width of the codes.
    """
    scale = scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16).float()
    unit = zero_point_unit(bits)
    zero = (low / (-unit * scale)).round_().clamp_(0, _LARGEST_ZERO_POINT).mul_(unit)
    return scale, zero


def nearest_codes(
    values: torch.Tensor, scale: torch.Tensor | float, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return the code of each value, still as a float: the grid point nearest to it."""
    return (values / scale).add_(zero).round_().clamp_(0, largest_code(bits))


def largest_code(bits: int) -> int:
    """Return the largest code of a width."""
    return (1 << bits) - 1
