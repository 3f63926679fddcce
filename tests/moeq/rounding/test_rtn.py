"""Round to nearest: codes, grids and errors against exhaustive float64 searches."""

import numpy as np
import pytest
import torch

from moeq.rounding import quantize_rtn
from support.reference import dequantize, unpack_bits

WIDTHS = (1, 2, 3, 4, 8)
GROUP = 32


def _weights(kind: str, rows: int = 16, columns: int = 2 * GROUP) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=generator)
    uniform = torch.rand(rows, columns, generator=generator)
    return {
        "normal": normal,
        "heavy tails": normal / uniform,
        "uniform": uniform - 0.5,
        "positive": uniform + 0.5,
        "negative": -uniform - 0.5,
        "outlier": torch.where(uniform > 0.99, 30.0, normal),
        "two values": torch.where(uniform > 0.5, 1.0, -1.0),
        "two positive values": torch.where(uniform > 0.5, 1.0, 0.5),
        "constant": torch.full((rows, columns), 0.75),
        "negative constant": torch.full((rows, columns), -0.75),
        "tiny": normal * 1e-4,
        "huge": normal * 1e3,
    }[kind]


KINDS = (
    "normal", "heavy tails", "uniform", "positive", "negative", "outlier", "two values",
    "two positive values", "constant", "negative constant", "tiny", "huge",
)  # fmt: skip


def _groups(weight: torch.Tensor) -> np.ndarray:
    return weight.double().reshape(-1, GROUP).numpy()


def _error(weight: torch.Tensor, bits: int) -> np.ndarray:
    """Return the squared error of each group, as read back from the three stored tensors."""
    result = dequantize(*quantize_rtn(weight, bits, GROUP), group_size=GROUP)
    return np.square(_groups(weight) - _groups(result)).sum(1)


def _nearest_error(
    groups: np.ndarray, scale: np.ndarray, zero: np.ndarray, levels: int
) -> np.ndarray:
    """Return the squared error of each group [n, G] on a grid with its zero in codes."""
    scale = np.where(scale == 0, 2.0**-24, scale)[:, None]
    codes = np.clip(np.rint(groups / scale + zero[:, None]), 0, levels)
    return np.square((codes - zero[:, None]) * scale - groups).sum(1)


def _min_max_error(groups: np.ndarray, levels: int) -> np.ndarray:
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    scale = ((high - low) / levels).astype(np.float16).astype(np.float64)
    unit = (levels + 1) / 256
    zero = np.clip(np.rint(-low / np.where(scale == 0, 1, scale) / unit), 0, 255) * unit
    return _nearest_error(groups, scale, zero, levels)


def _searched_error(groups: np.ndarray, levels: int) -> np.ndarray:
    """Return the least squared error over a dense mesh of scales of both signs and zeros."""
    spread = np.abs(groups).max(1) * 2
    best = np.full(len(groups), np.inf)
    for share in np.linspace(0.02, 1.02, 101):
        magnitude = (spread * share / levels).astype(np.float16).astype(np.float64)
        for zero in np.arange(0, levels + 0.25, 0.25):
            for scale in (magnitude, -magnitude):
                error = _nearest_error(groups, scale, np.full(len(groups), zero), levels)
                best = np.minimum(best, error)
    return best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_is_the_nearest_given_the_stored_grid(bits: int, kind: str) -> None:
    weight = _weights(kind)
    packed, scale, zero = quantize_rtn(weight, bits, GROUP)
    codes = unpack_bits(packed.numpy(), bits).reshape(-1, GROUP)
    step = scale.double().numpy().reshape(-1, 1, 1)
    points = step * (np.arange(2**bits) - zero.numpy().reshape(-1, 1, 1) * 2.0**bits / 256)
    distances = np.abs(_groups(weight)[..., None] - points)
    chosen = np.take_along_axis(distances, codes[..., None], axis=2)[..., 0]
    # float32 arithmetic may break a near tie the other way.
    assert (chosen <= distances.min(2) + 1e-4 * np.abs(step[..., 0])).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_no_group_is_worse_than_plain_min_max_rounding(bits: int, kind: str) -> None:
    weight = _weights(kind)
    plain = _min_max_error(_groups(weight), 2**bits - 1)
    tolerance = 1e-6 * np.square(_groups(weight)).sum(1)
    assert (_error(weight, bits) <= plain * (1 + 1e-5) + tolerance).all()


@pytest.mark.parametrize(
    ("kind", "factor"),
    # Trained weights look like the first; the last has values hundreds of times the median.
    [("normal", 1.04), ("uniform", 1.04), ("positive", 1.2), ("outlier", 1.2), ("heavy tails", 2)],
)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_error_is_close_to_that_of_an_exhaustive_search(
    bits: int, kind: str, factor: float
) -> None:
    weight = _weights(kind, rows=8)
    best = _searched_error(_groups(weight), 2**bits - 1)
    assert _error(weight, bits).sum() <= factor * best.sum()


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_group_of_zeros_stays_zero(bits: int) -> None:
    result = dequantize(*quantize_rtn(torch.zeros(2, GROUP), bits, GROUP), group_size=GROUP)
    assert result.abs().max() < 2.0**-24 + 1e-12


@pytest.mark.parametrize("value", [0.75, -0.75])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_constant_group_is_kept_to_float16_precision(bits: int, value: float) -> None:
    weight = torch.full((2, GROUP), value)
    result = dequantize(*quantize_rtn(weight, bits, GROUP), group_size=GROUP)
    torch.testing.assert_close(result, weight.double(), rtol=2e-3, atol=0)


def test_a_negative_group_uses_the_whole_8_bit_grid() -> None:
    weight = -torch.rand(4, GROUP, generator=torch.Generator().manual_seed(1)) - 0.01
    result = dequantize(*quantize_rtn(weight, 8, GROUP), group_size=GROUP)
    step = -weight.min().item() / 255
    assert (result - weight).abs().max() < 0.55 * step


def test_a_wide_value_range_within_a_matrix_keeps_small_groups_small() -> None:
    weight = torch.ones(1, 2 * GROUP)
    weight[:, :GROUP] = 1e-3
    result = dequantize(*quantize_rtn(weight, 4, GROUP), group_size=GROUP)
    torch.testing.assert_close(result, weight.double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_are_finite_float16_and_never_zero(bits: int, kind: str) -> None:
    scale = quantize_rtn(_weights(kind), bits, GROUP).scale
    assert scale.dtype == torch.float16
    assert torch.isfinite(scale).all()
    assert (scale != 0).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_short_last_group_is_rounded_as_well_as_others(bits: int) -> None:
    weight, levels = _weights("normal", rows=8, columns=GROUP + 16), 2**bits - 1
    result = dequantize(*quantize_rtn(weight, bits, GROUP), GROUP, bits)
    for part in (slice(0, GROUP), slice(GROUP, None)):
        groups = weight[:, part].double().numpy()
        error = np.square(groups - result[:, part].numpy()).sum(1)
        assert (error <= _min_max_error(groups, levels) * (1 + 1e-5)).all()
        if bits < 4:
            assert error.sum() <= 1.04 * _searched_error(groups, levels).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_source_types_give_the_result_of_the_same_values_in_float32(
    dtype: torch.dtype,
) -> None:
    weight = _weights("normal").to(dtype)
    narrow, wide = quantize_rtn(weight, 3, GROUP), quantize_rtn(weight.float(), 3, GROUP)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_rows_are_quantized_alike_whatever_their_neighbours() -> None:
    # More weights than the code looks at in one piece.
    weight = torch.randn(5000, 2 * GROUP, generator=torch.Generator().manual_seed(2))
    whole, last = quantize_rtn(weight, 2, GROUP), quantize_rtn(weight[-3:], 2, GROUP)
    assert all(torch.equal(a[-3:], b) for a, b in zip(whole, last, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_that_are_not_finite_are_refused(bits: int, bad: float) -> None:
    weight = _weights("normal")
    weight[3, 40] = bad
    with pytest.raises(ValueError, match="NaN, infinite"):
        quantize_rtn(weight, bits, GROUP)


def test_weights_too_large_for_float16_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="too large"):
        quantize_rtn(torch.full((1, GROUP), 1e6), 2, GROUP)
