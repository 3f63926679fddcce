"""Dense layers at 4 and 8 bits on every kernel, against float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.kernels import (
    CPU_ERRORS,
    CPU_ISAS,
    REFERENCE_ERRORS,
    cpu_runner,
    random_tokens,
    relative_error,
    slow_where_portable,
)
from support.linear import DenseLayer, random_layer
from vllm_moeq.kernels import LinearCall, LinearLayout, packed_linear, reference
from vllm_moeq.kernels.cpu import linear as cpu_linear

COLUMNS = 256
INT8_ERROR = 2e-2
both_widths = pytest.mark.parametrize("bits", [4, 8])
both_precisions = pytest.mark.parametrize("precision", ["int16", "int8"])


@pytest.fixture(params=["reference", *map(slow_where_portable, CPU_ISAS)], scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "reference":
        yield "reference"
    else:
        with cpu_runner(request.param):
            yield "cpu"


def _check(
    layer: DenseLayer,
    kernel: str,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    limit: float | None = None,
) -> None:
    result = layer.run(kernel, x, bias)
    expected = x.double() @ layer.float64.T
    if bias is not None:
        expected += bias.double()
    assert (result.dtype, result.shape) == (x.dtype, expected.shape)
    errors = REFERENCE_ERRORS if kernel == "reference" else CPU_ERRORS | {torch.float32: 5e-5}
    if kernel == "reference" and x.dtype == torch.bfloat16:
        limit = 4e-3  # it rounds the weights to the type of the tokens
    assert relative_error(result, expected) < (limit or errors[x.dtype])


@both_precisions
@both_widths
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_equals_float64(
    kernel: str, bits: int, group_size: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", precision)
    limit = INT8_ERROR if precision == "int8" and kernel == "cpu" else None
    layer = random_layer(130, COLUMNS, bits, group_size)
    # All numbers of tokens that a micro-kernel or a task handles at once, and their remainders.
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 13, 47, 48, 49, 95, 96, 97, 300):
        _check(layer, kernel, random_tokens(count, COLUMNS), limit=limit)


@both_widths
@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", REFERENCE_ERRORS)
def test_every_type_any_number_of_rows_and_a_bias(
    kernel: str, bits: int, rows: int, dtype: torch.dtype
) -> None:
    layer = random_layer(rows, 512, bits)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(3)).to(dtype)
    _check(layer, kernel, random_tokens(9, 512, dtype), bias)


def test_more_tokens_than_one_pass_takes_in_any_shape(kernel: str) -> None:
    layer = random_layer(66, 64, 4, 32)
    _check(layer, kernel, random_tokens(1100, 64))
    x = random_tokens(24, 64)
    whole = layer.run(kernel, x)
    assert torch.equal(layer.run(kernel, x.view(2, 3, 4, 64)), whole.view(2, 3, 4, 66))
    assert torch.equal(layer.run(kernel, x.t().contiguous().t()), whole)
    assert layer.run(kernel, x[:0]).shape == (0, 66)


@both_precisions
@both_widths
@pytest.mark.parametrize("sign", [1, -1])
def test_codes_and_tokens_at_the_ends_of_their_range(
    kernel: str, bits: int, sign: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of products do not overflow."""
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", precision)
    for byte, code in ((0, -(2 ** (bits - 1))), (255, 2 ** (bits - 1) - 1)):
        layer = random_layer(64, COLUMNS, bits, 128)
        layer.weight.packed.view(torch.uint8).fill_(byte)
        layer.float64.copy_(code * layer.weight.scale.double().repeat_interleave(128, 1))
        for count in (1, 9):
            _check(layer, kernel, torch.full((count, COLUMNS), float(sign)), limit=1e-3)


@both_precisions
@both_widths
@pytest.mark.parametrize("kernel", map(slow_where_portable, CPU_ISAS), indirect=True)
def test_bits_depend_on_neither_threads_nor_the_batch(
    kernel: str, bits: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", precision)
    layer, x = random_layer(200, COLUMNS, bits), random_tokens(107, COLUMNS)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(layer.run(kernel, x))
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([layer.run(kernel, x[i : i + 1]) for i in range(len(x))])
    assert all(torch.equal(result, alone) for result in results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others(
    kernel: str, bad: float
) -> None:
    layer, x = random_layer(70, COLUMNS, 4), random_tokens(6, COLUMNS)
    good = layer.run(kernel, x)
    x[2, 17] = bad
    result = layer.run(kernel, x)
    assert not result[2].isfinite().any()
    if kernel == "cpu":
        assert result[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(result[others], good[others])


def test_the_float64_oracle_of_the_reference() -> None:
    layer, x = random_layer(70, COLUMNS, 8), random_tokens(3, COLUMNS).double()
    call = LinearCall.from_op(x, *layer.weight, None, layer.layout.to_tensor(), 70)
    result = reference.run_linear(call, torch.float64)
    assert relative_error(result, x @ layer.float64.T) < 1e-14


def test_tiles_hold_every_byte_once(kernel: str) -> None:
    layer = random_layer(128, COLUMNS, 4)
    (tiles, scale), _ = layer.prepared(kernel)
    if kernel == "cpu":
        groups = 128 * COLUMNS // 64
        assert tiles.nbytes == 128 * COLUMNS // 2 + groups * 3
        assert scale.nbytes == 0


def _arguments(layer: DenseLayer, kernel: str, x: torch.Tensor) -> tuple[Any, ...]:
    weight, layout = layer.prepared(kernel)
    return (x, *weight, torch.ones(layer.layout.rows), layout, layer.layout.rows)


def test_registration_passes_torchs_checks(kernel: str) -> None:
    arguments = _arguments(random_layer(70, COLUMNS, 4), kernel, random_tokens(6, COLUMNS))
    torch.library.opcheck(packed_linear.default, arguments)


def test_another_width_runs_in_the_same_compiled_graph(kernel: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, *rest: packed_linear(x * 2, *rest).sin(), fullgraph=True, dynamic=False
    )
    x = random_tokens(6, COLUMNS)
    for bits in (4, 8):
        layer = random_layer(70, COLUMNS, bits)
        result = compiled(*_arguments(layer, kernel, x))
        expected = (2 * x.double() @ layer.float64.T + 1).sin()
        assert relative_error(result, expected) < 2e-3


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (LinearLayout(3, 64, 70, 256), "3 bits"),
        (LinearLayout(4, 256, 70, 256), "groups of 256"),
        (LinearLayout(4, 128, 70, 192), "192 inputs are not whole groups of 128"),
    ],
)
def test_layouts_that_no_kernel_runs_are_refused(layout: LinearLayout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check()


def test_what_does_not_belong_together_is_refused(kernel: str) -> None:
    layer, x = random_layer(70, COLUMNS, 4), random_tokens(2, COLUMNS)
    weight, layout = layer.prepared(kernel)
    with pytest.raises(ValueError, match="2 outputs do not fit the layout"):
        packed_linear(x, *weight, None, layout, 2)
    with pytest.raises(ValueError, match="do not fit the layout, which has 256 inputs"):
        packed_linear(x[:, :128], *weight, None, layout, 70)
    with pytest.raises(ValueError, match=r"the bias is \[69\], expected \[70\]"):
        packed_linear(x, *weight, torch.ones(69), layout, 70)


@pytest.mark.skipif(not CPU_ISAS, reason="needs x86-64 with AVX2")
def test_the_cpu_kernel_refuses_weights_that_it_has_not_prepared() -> None:
    layer, x = random_layer(70, COLUMNS, 4), random_tokens(2, COLUMNS)
    call = LinearCall.from_op(x, *layer.weight, None, layer.layout.to_tensor(), 70)
    with pytest.raises(ValueError, match="are the weights prepared for this kernel"):
        cpu_linear.run(call)


def test_scales_that_float16_does_not_hold_are_found() -> None:
    weight = random_layer(70, COLUMNS, 4).weight
    assert weight.is_exact()
    assert not weight._replace(scale=weight.scale.float() / 3).is_exact()
