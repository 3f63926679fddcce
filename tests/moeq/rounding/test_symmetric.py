"""Symmetric grids of dense layers, against float64 searches and compressed-tensors' own reader."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from moeq.rounding import Hessian, gram, round_linear, round_linear_by_inputs
from moeq.rounding.symmetric import LinearWeight

WIDTHS, GROUP = (4, 8), 32


def _weight(kind: str, rows: int = 8, columns: int = 4 * GROUP) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=generator)
    return {
        "normal": normal,
        "heavy tails": normal / torch.rand(rows, columns, generator=generator),
        "positive": normal.abs() + 0.5,
        "negative": -normal.abs() - 0.5,
        "zeros": torch.zeros(rows, columns),
        "tiny": normal * 1e-6,
        "huge": normal * 1e4,
    }[kind]


def _stored(rounded: LinearWeight, bits: int) -> torch.Tensor:
    """Return the weights in float64, read by compressed-tensors."""
    shape = torch.Size(rounded.shape.tolist())
    codes = unpack_from_int32(rounded.packed, bits, shape).double()
    return codes * rounded.scale.double().repeat_interleave(GROUP, 1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    "kind", ["normal", "heavy tails", "positive", "negative", "zeros", "tiny", "huge"]
)
def test_the_error_is_near_that_of_the_best_scale(kind: str, bits: int) -> None:
    weight = _weight(kind)
    found = _stored(round_linear(weight, bits, GROUP), bits)
    groups = weight.double().view(-1, GROUP).numpy()
    zero = 2 ** (bits - 1)
    extreme = np.maximum(groups.min(1) / -zero, groups.max(1) / (zero - 1))
    best = np.full(len(groups), np.inf)
    for share in np.linspace(0.3, 1.02, 400):
        scale = np.maximum(extreme * share, 2.0**-24)[:, None]
        codes = np.clip(np.rint(groups / scale), -zero, zero - 1)
        best = np.minimum(best, np.square(codes * scale - groups).sum(1))
    error = np.square(found.view(-1, GROUP).numpy() - groups).sum(1)
    # At 8 bits, the best of 400 scales is the luckiest; where weights are next to nothing, float16
    # has few.
    bound = 1.05 if bits == 4 else 1.3
    assert error.sum() <= bound * best.sum() + (1e-9 if kind == "tiny" else 0)


@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_are_those_of_both_16_bit_types(bits: int) -> None:
    scale = torch.cat(
        [round_linear(_weight(kind), bits, GROUP).scale for kind in ("normal", "tiny", "huge")]
    )
    assert scale.dtype == torch.bfloat16
    assert torch.equal(scale.to(torch.float16).float(), scale.float())


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_is_dequantized_is_what_is_stored(bits: int) -> None:
    rounded = round_linear(_weight("normal"), bits, GROUP)
    assert rounded.shape.tolist() == [8, 4 * GROUP]
    assert torch.equal(rounded.dequantize(bits).double(), _stored(rounded, bits))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8])
def test_weights_that_cannot_be_stored_are_refused(bad: float) -> None:
    weight = _weight("normal")
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="NaN, infinite, or too large"):
        round_linear(weight, 8, GROUP)


@pytest.mark.parametrize("bits", WIDTHS)
def test_gptq_keeps_outputs_better_than_rounding_to_nearest(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = _weight("normal")
    mixing = torch.randn(4 * GROUP, 4 * GROUP, generator=generator)
    x = torch.randn(2000, 4 * GROUP, generator=generator) @ mixing  # inputs that go together
    hessian = Hessian.of(gram(x)[None], [len(x)])
    by_inputs = _stored(round_linear_by_inputs(weight, hessian, bits, GROUP), bits)
    to_nearest = _stored(round_linear(weight, bits, GROUP), bits)

    def error(rounded: torch.Tensor) -> float:
        return float(((rounded - weight.double()) @ x.double().T).square().sum())

    assert error(by_inputs) < 0.6 * error(to_nearest)
