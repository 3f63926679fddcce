"""HQQ: the errors that it minimizes, and what it stores."""

import numpy as np
import pytest
import torch

from moeq.rounding import QuantizedWeight, quantize_hqq, quantize_rtn
from support.reference import dequantize

GROUP = 64


def _heavy_tailed(rows: int = 64) -> torch.Tensor:
    source = np.random.default_rng(0)
    return torch.from_numpy(source.standard_t(3, size=(rows, 4 * GROUP)) * 0.02)


def _error(weight: torch.Tensor, found: QuantizedWeight, power: float) -> float:
    """Return the powers of the errors, each in steps of its group's grid."""
    difference = (dequantize(*found, group_size=GROUP) - weight).view(len(weight), -1, GROUP)
    return float((difference.abs() / found[1].double()[..., None]).pow(power).sum())


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_small_powers_of_the_errors_are_smaller_than_with_the_least_squares(bits: int) -> None:
    weight = _heavy_tailed()
    ours, nearest = quantize_hqq(weight, bits, GROUP), quantize_rtn(weight, bits, GROUP)
    assert torch.equal(ours.scale, nearest.scale)
    assert _error(weight, ours, 0.7) < _error(weight, nearest, 0.7)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_code_is_the_nearest_on_its_grid(bits: int) -> None:
    weight = _heavy_tailed(8)
    found = quantize_hqq(weight, bits, GROUP)
    step = found.scale.double()[..., None]
    zero = found.zero_point.double()[..., None] * 2**bits / 256
    points = step[..., None] * (torch.arange(2**bits, dtype=torch.float64) - zero[..., None])
    distances = (weight.view(8, -1, GROUP, 1) - points).abs().amin(-1)
    chosen = (dequantize(*found, group_size=GROUP) - weight).abs().view_as(distances)
    assert (chosen <= distances + 1e-4 * step).all()


def test_rows_are_quantized_alike_whatever_their_neighbours() -> None:
    # More weights than the code looks at in one piece.
    weight = _heavy_tailed(1500)
    whole, last = quantize_hqq(weight, 2, GROUP), quantize_hqq(weight[-3:], 2, GROUP)
    assert all(torch.equal(a[-3:], b) for a, b in zip(whole, last, strict=True))


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="weights are NaN, infinite"):
        quantize_hqq(torch.full((2, GROUP), float("nan")), 2, GROUP)
