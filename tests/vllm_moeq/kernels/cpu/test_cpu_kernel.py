"""The CPU kernel against a float64 loop over tokens and experts, for every build that runs here.

``portable`` is the AVX-512 kernel made of smaller vectors, so its code is tested on any x86-64.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from support.experts import Experts, expected_output, random_experts
from vllm_moeq.kernels import FusedExpertsCall, cpu, reference
from vllm_moeq.kernels.cpu import library
from vllm_moeq.kernels.cpu.build import INSTRUCTION_SETS, PORTABLE
from vllm_moeq.kernels.reference import ACTIVATIONS

E, HIDDEN, INTERMEDIATE = 5, 256, 384
MIXED = ([1, 2, 3, 4, 8], [8, 4, 1, 2, 3])
ISAS = [isa.name for isa in (*INSTRUCTION_SETS, PORTABLE) if isa.runs_here()]
# Relative to the norm of the output: 16-bit activations twice, and the rounding of the output.
TOLERANCE = {torch.float32: 4e-4, torch.bfloat16: 3e-3, torch.float16: 6e-4, torch.float64: 4e-4}
INT8_TOLERANCE = 2.5e-2
both_precisions = pytest.mark.parametrize("precision", ["int16", "int8"])

pytestmark = pytest.mark.skipif(not ISAS, reason="needs x86-64 with AVX2")


@pytest.fixture(params=ISAS, autouse=True, scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEQ_CPU_ISA", request.param)
        library.load.cache_clear()
        yield request.param
    library.load.cache_clear()


@pytest.fixture(autouse=True)
def default_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEQ_CPU_ACTIVATION", raising=False)


def _routing(tokens: int, top_k: int = 2, experts: int = E) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    return torch.rand(tokens, top_k, generator=generator), ids.int()


def _tokens(
    count: int, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32, seed: int = 2
) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _run(
    experts: Experts,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "silu",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    on_input: bool = False,
) -> torch.Tensor:
    weights = cpu.prepare(experts.weights, experts.layout, activation)
    return cpu.run(FusedExpertsCall.from_op(
        x, topk_weights, topk_ids, weights, w13_bias, w2_bias, experts.layout.to_tensor(),
        expert_map, activation, on_input,
    ))  # fmt: skip


def _error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


def _check(
    experts: Experts,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "silu",
    tolerance: float | None = None,
    **case: Any,
) -> None:
    result = _run(experts, x, topk_weights, topk_ids, activation, **case)
    expected = expected_output(experts, x, topk_weights, topk_ids, activation, **case)
    assert (result.dtype, result.shape) == (x.dtype, x.shape)
    assert _error(result, expected) < (tolerance or TOLERANCE[x.dtype])


def test_this_is_the_instruction_set_under_test(isa: str) -> None:
    assert library.load().moeq_isa().decode() == isa


@both_precisions
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_width_and_group_size(
    bits: int, group_size: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", precision)
    tolerance = INT8_TOLERANCE if precision == "int8" else None
    experts = random_experts([bits] * 2, [bits] * 2, group_size, HIDDEN, INTERMEDIATE)
    # All numbers of tokens that a micro-kernel handles at once, and their remainders.
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 13):
        _check(experts, _tokens(count), *_routing(count, experts=2), tolerance=tolerance)


@both_precisions
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_all_codes_at_their_largest(
    bits: int, sign: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of products at the ends of their range do not overflow."""
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", precision)
    experts = random_experts([bits], [bits], 128, HIDDEN, 128)
    for packed in (experts.weights.w13_packed, experts.weights.w2_packed):
        packed.fill_(255)
    scale = experts.weights.w13_scale
    scale[:, 128:] = 2**-9 / 2**bits  # up, of one sign
    scale[:, :128] = 2**-9 / 2**bits
    experts.weights.w13_zero_point.zero_()
    largest = (2**bits - 1) * 2**-9 / 2**bits
    experts.w13.fill_(largest)
    half = experts.weights.w2_scale.double().repeat_interleave(128, -1)
    zero = experts.weights.w2_zero_point.double().repeat_interleave(128, -1)
    experts.w2.copy_(half * (2**bits - 1 - zero * 2**bits / 256))
    for count in (1, 3, 9):
        x = torch.full((count, HIDDEN), float(sign))
        _check(experts, x, torch.ones(count, 1), torch.zeros(count, 1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mixed_widths_that_differ_between_projections(dtype: torch.dtype) -> None:
    experts = random_experts(*MIXED, 32, HIDDEN, INTERMEDIATE)
    _check(experts, _tokens(20, dtype=dtype), *_routing(20))


@pytest.mark.parametrize(
    ("group_size", "hidden", "intermediate"),
    [(32, 32, 32), (32, 96, 160), (64, 192, 64), (64, 64, 192), (128, 128, 384), (32, 352, 416)],
)
@pytest.mark.parametrize("gated", [True, False])
def test_sizes_that_are_no_multiple_of_a_tile(
    group_size: int, hidden: int, intermediate: int, gated: bool
) -> None:
    experts = random_experts(*MIXED, group_size, hidden, intermediate, gated)
    activation = "silu" if gated else "silu_no_mul"
    _check(experts, _tokens(11, hidden), *_routing(11), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_activation(activation: str, bias: bool) -> None:
    gated = not activation.endswith("_no_mul")
    case = {}
    if bias:
        generator = torch.Generator().manual_seed(3)
        case["w13_bias"] = torch.randn(E, 160 * (2 if gated else 1), generator=generator)
        case["w2_bias"] = torch.randn(E, HIDDEN, generator=generator).bfloat16()
    experts = random_experts(*MIXED, 32, HIDDEN, 160, gated)
    _check(experts, 4 * _tokens(9), *_routing(9), activation, **case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(activation: str) -> None:
    gated = not activation.endswith("_no_mul")
    experts = random_experts(*MIXED, 32, HIDDEN, 160, gated)
    _check(experts, 300 * _tokens(9), *_routing(9), activation)


def test_experts_of_other_ranks_are_left_out() -> None:
    expert_map = torch.tensor([-1, 3, -1, 0, 1, -1, 4, 2], dtype=torch.int32)
    case = {"expert_map": expert_map, "w2_bias": torch.ones(E, HIDDEN)}
    _check(random_experts(*MIXED, 32, HIDDEN), _tokens(9), *_routing(9, experts=8), **case)


@pytest.mark.parametrize("mapped", [False, True])
def test_ids_of_minus_one_are_padding(mapped: bool) -> None:
    weights, ids = _routing(9)
    ids[0], ids[3, 1] = -1, -1
    case = {"expert_map": torch.tensor([1, 0, 3, 2, 4])} if mapped else {}
    _check(random_experts(*MIXED, 32, HIDDEN), _tokens(9), weights, ids, **case)


def test_experts_without_tokens_change_nothing() -> None:
    weights, ids = _routing(9)
    _check(random_experts(*MIXED, 32, HIDDEN), _tokens(9), weights, ids.clamp(max=1))


def test_the_same_expert_twice_counts_twice() -> None:
    weights, ids = _routing(9)
    ids[4] = ids[4, 0].item()
    _check(random_experts(*MIXED, 32, HIDDEN), _tokens(9), weights, ids)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "swigluoai", "relu2_no_mul"])
def test_router_weight_on_the_input(activation: str, bias: bool) -> None:
    gated = not activation.endswith("_no_mul")
    case: dict[str, Any] = {"on_input": True}
    if bias:
        rows = 2 * INTERMEDIATE if gated else INTERMEDIATE
        case |= {"w13_bias": torch.randn(E, rows), "w2_bias": torch.ones(E, HIDDEN)}
    weights, ids = _routing(9, top_k=1)
    weights[0] = 0  # the biases of its expert count all the same
    experts = random_experts(*MIXED, 32, HIDDEN, INTERMEDIATE, gated)
    _check(experts, _tokens(9), weights, ids, activation, **case)


def test_no_tokens_give_no_output() -> None:
    x, (weights, ids) = _tokens(1)[:0], _routing(1)
    result = _run(random_experts(*MIXED, 32, HIDDEN), x, weights[:0], ids[:0])
    assert result.shape == (0, HIDDEN)


def test_tokens_of_any_strides() -> None:
    wide = _tokens(9, 2 * HIDDEN)
    weights, ids = _routing(9)
    transposed = ids.t().contiguous().t()
    experts = random_experts(*MIXED, 32, HIDDEN)
    _check(experts, wide[:, ::2], weights.double(), transposed.long())


def test_more_tokens_than_one_pass_takes() -> None:
    experts = random_experts([3, 2], [2, 3], 32, 64, 64)
    count = 1100
    x, (weights, ids) = _tokens(count, 64), _routing(count, 2, 2)
    result = _run(experts, x, weights, ids)
    call = FusedExpertsCall.from_op(
        x.double(), weights.double(), ids, experts.weights, None, None, experts.layout.to_tensor(),
        None, "silu", False,
    )  # fmt: skip
    expected = reference.run(call, torch.float64)
    assert _error(result, expected) < TOLERANCE[torch.float32]


def _outlier_tokens(count: int, hidden: int) -> torch.Tensor:
    """Gaussian, with 1 % of the channels 20 times as large."""
    x = _tokens(count, hidden)
    channels = torch.randperm(hidden, generator=torch.Generator().manual_seed(4))
    x[:, channels[: max(1, hidden // 100)]] *= 20
    return x


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(
    ("precision", "gaussian_limit", "outlier_limit"),
    [("int16", 3e-4, 3e-4), ("int8", INT8_TOLERANCE, 6e-2)],
)
def test_error_of_the_activation_precision(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    gaussian_limit: float,
    outlier_limit: float,
    outliers: bool,
) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", precision)
    experts = random_experts([4, 3, 2], [4, 3, 2], 128, 1024, 512)
    x = _outlier_tokens(16, 1024) if outliers else _tokens(16, 1024)
    weights, ids = _routing(16, experts=3)
    error = _error(_run(experts, x, weights, ids), expected_output(experts, x, weights, ids))
    assert error < (outlier_limit if outliers else gaussian_limit)
    if precision == "int8":
        assert error > 1e-3, "int8 activations were not used"


def test_bfloat16_error_is_below_the_documented_limit() -> None:
    experts = random_experts([4, 3, 2], [4, 3, 2], 128, 1024, 512)
    for x in (_tokens(16, 1024), _outlier_tokens(16, 1024)):
        x, (weights, ids) = x.bfloat16(), _routing(16, experts=3)
        error = _error(_run(experts, x, weights, ids), expected_output(experts, x, weights, ids))
        assert error < 3e-3


@both_precisions
@pytest.mark.parametrize("count", [1, 7, 40])
def test_equal_bits_at_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, precision: str, count: int
) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", precision)
    experts = random_experts(*MIXED, 64, HIDDEN, INTERMEDIATE)
    x, (weights, ids) = _tokens(count), _routing(count)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(_run(experts, x, weights, ids))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    experts = random_experts(*MIXED, 64, HIDDEN, INTERMEDIATE)
    weights = cpu.prepare(experts.weights, experts.layout, "silu")
    layout = experts.layout.to_tensor()
    topk_weights, ids = _routing(20)
    inputs = [_tokens(20, seed=seed) for seed in range(16)]

    def run(x: torch.Tensor) -> torch.Tensor:
        return cpu.run(FusedExpertsCall.from_op(
            x, topk_weights, ids, weights, None, None, layout, None, "silu", False
        ))  # fmt: skip

    alone = [run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, inputs))
    assert all(map(torch.equal, alone, together))


def test_a_token_gets_the_same_bits_alone_and_in_a_batch() -> None:
    experts = random_experts(*MIXED, 64, HIDDEN, INTERMEDIATE)
    x, (weights, ids) = _tokens(40), _routing(40)
    together = _run(experts, x, weights, ids)
    alone = [_run(experts, x[i : i + 1], weights[i : i + 1], ids[i : i + 1]) for i in range(40)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others(bad: float) -> None:
    experts = random_experts(*MIXED, 64, HIDDEN, INTERMEDIATE)
    x, (weights, ids) = _tokens(6), _routing(6)
    good = _run(experts, x, weights, ids)
    broken = x.clone()
    broken[2, 17] = bad
    result = _run(experts, broken, weights, ids)
    assert result[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(result[others], good[others])


@pytest.mark.parametrize("scale", [0.0, 1e-37, 1e30])
def test_tokens_at_the_ends_of_the_range(scale: float) -> None:
    experts = random_experts(*MIXED, 64, HIDDEN, INTERMEDIATE, gated=False)
    x, (weights, ids) = scale * _tokens(6), _routing(6)
    result = _run(experts, x, weights, ids, "relu_no_mul")
    expected = expected_output(experts, x, weights, ids, "relu_no_mul")
    assert (result.double() - expected).norm() <= 4e-4 * expected.norm() + 1e-28


@pytest.mark.parametrize("mapped", [False, True])
def test_an_expert_id_that_is_no_expert_is_refused(mapped: bool) -> None:
    weights, ids = _routing(6)
    ids[3, 1] = 9
    case = {"expert_map": torch.arange(E)} if mapped else {}
    with pytest.raises(ValueError, match="expert ids reach 9.*5 local experts"):
        _run(random_experts(*MIXED, 32, HIDDEN), _tokens(6), weights, ids, **case)


def test_a_map_to_more_experts_than_there_are_is_refused() -> None:
    case = {"expert_map": torch.arange(1, E + 1)}
    with pytest.raises(ValueError, match="5 local experts"):
        _run(random_experts(*MIXED, 32, HIDDEN), _tokens(6), *_routing(6), **case)


def test_tensors_that_do_not_fit_the_layer_are_refused() -> None:
    experts = random_experts(*MIXED, 32, HIDDEN)
    weights, ids = _routing(6)
    with pytest.raises(ValueError, match=r"tokens \[6, 128\] do not fit the layout"):
        _run(experts, _tokens(6, 128), weights, ids)
    with pytest.raises(ValueError, match=r"5 tokens with router weights \[6, 2\]"):
        _run(experts, _tokens(5), weights, ids)
    with pytest.raises(ValueError, match=r"router weights \[6, 1\] and expert ids \[6, 2\]"):
        _run(experts, _tokens(6), weights[:, :1], ids)
    with pytest.raises(ValueError, match=r"w2_bias is \[5, 255\], expected \[5, 256\]"):
        _run(experts, _tokens(6), weights, ids, w2_bias=torch.zeros(E, HIDDEN - 1))


def test_weights_that_were_not_prepared_are_refused() -> None:
    experts = random_experts(*MIXED, 32, HIDDEN)
    weights, ids = _routing(6)
    layout = experts.layout.to_tensor()
    call = FusedExpertsCall.from_op(
        _tokens(6), weights, ids, experts.weights, None, None, layout, None, "silu", False
    )
    with pytest.raises(ValueError, match="are the weights prepared for this kernel"):
        cpu.run(call)


def test_repacking_keeps_every_byte_once() -> None:
    """Tiles are as large as the canonical weights where rows fill them: no padding, no copies."""
    experts = random_experts(*MIXED, 64, HIDDEN, INTERMEDIATE)
    prepared = cpu.prepare(experts.weights, experts.layout, "silu")
    size = [sum(tensor.nbytes for tensor in tensors) for tensors in (experts.weights, prepared)]
    assert size[0] == size[1]


def test_unknown_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", "int4")
    with pytest.raises(ValueError, match="MOEQ_CPU_ACTIVATION='int4' is not one of"):
        cpu.unavailable(torch.device("cpu"))
