"""HQQ: rounding without data that lets outliers go.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): the zero
point minimizes not the squares of the errors but their 0.7-th powers, by alternating between a
shrinkage of the errors and a closed-form zero point. The scale stays.
"""

import torch

from moeq.rounding.grid import QuantizedWeight, nearest_codes, round_groups, storable
from moeq.rounding.groups import search_alone

_POWER = 0.7
_BETA, _BETA_GROWTH = 10.0, 1.01
_ROUNDS = 20


def quantize_hqq(weight: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Quantize a matrix; see the module.

    Args:
        weight: [N, K], any floating type; K is a multiple of 8.
        bits: Width, one of the format's.
        group_size: Weights of a row that share a grid; the last group may be shorter.

    Raises:
        ValueError: The weights are not finite, or too large for float16 scales.
    """

    def choose(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale, zero = search_alone(groups, bits)
        steps = groups / scale
        beta, best = _BETA, _error(steps, zero, bits)
        for _ in range(_ROUNDS):
            codes = nearest_codes(steps, 1.0, zero, bits)
            outliers = _shrink(steps - (codes - zero), beta)
            wanted = (codes - (steps - outliers)).mean(-1, keepdim=True)
            _, new_zero = storable(scale, -wanted * scale, bits)
            error = _error(steps, new_zero, bits)
            better = error < best
            zero, best = torch.where(better, new_zero, zero), torch.where(better, error, best)
            beta *= _BETA_GROWTH
        return nearest_codes(steps, 1.0, zero, bits), scale, zero

    return round_groups(weight, bits, group_size, choose)


def _error(steps: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    difference = steps - (nearest_codes(steps, 1.0, zero, bits) - zero)
    return difference.abs().pow_(_POWER).sum(-1, keepdim=True)


def _shrink(difference: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the minimizer of |e| ** p + beta / 2 * (e - difference) ** 2, approximately."""
    size = difference.abs()
    threshold = size.clamp(min=1e-12).pow(_POWER - 1) * (_POWER / beta)
    return difference.sign() * (size - threshold).clamp(min=0)
