"""What only the CPU kernel does, for every build that runs here, against float64.

What every kernel computes is in test_conformance.py.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from support.experts import expected_output, random_experts
from support.kernels import (
    CPU_ISAS,
    Runner,
    cpu_runner,
    random_routing,
    random_tokens,
    relative_error,
    slow_where_portable,
)
from vllm_moeq.kernels import ExpertWeights, FusedExpertsCall, cpu, reference
from vllm_moeq.kernels.reference import ACTIVATIONS

E, HIDDEN, INTERMEDIATE = 5, 256, 384
MIXED = ([1, 2, 3, 4, 8], [8, 4, 1, 2, 3])
INT8_ERROR = 2.5e-2
both_precisions = pytest.mark.parametrize("precision", ["int16", "int8"])

pytestmark = pytest.mark.skipif(not CPU_ISAS, reason="needs x86-64 with AVX2")


@pytest.fixture(params=map(slow_where_portable, CPU_ISAS), autouse=True, scope="module")
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    with cpu_runner(request.param) as found:
        yield found


@both_precisions
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_width_and_group_size(
    runner: Runner, bits: int, group_size: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", precision)
    if precision == "int8":
        runner = replace(runner, errors={torch.float32: INT8_ERROR})
    experts = random_experts([bits] * 2, [bits] * 2, group_size, HIDDEN, INTERMEDIATE)
    # All numbers of tokens that a micro-kernel handles at once, and their remainders.
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 19, 20, 50):
        runner.check(experts, random_tokens(count), *random_routing(count, experts=2))


@both_precisions
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_all_codes_at_their_largest(
    runner: Runner, bits: int, sign: int, precision: str, monkeypatch: pytest.MonkeyPatch
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
        runner.check(experts, x, torch.ones(count, 1), torch.zeros(count, 1, dtype=torch.int32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(runner: Runner, activation: str) -> None:
    gated = not activation.endswith("_no_mul")
    experts = random_experts(*MIXED, 32, HIDDEN, 160, gated)
    runner.check(experts, 300 * random_tokens(9), *random_routing(9), activation)


def test_more_tokens_than_one_pass_takes(runner: Runner) -> None:
    experts = random_experts([3, 2], [2, 3], 32, 64, 64)
    count = 1100
    x, (weights, ids) = random_tokens(count, 64), random_routing(count, 2, 2)
    result = runner.run(experts, x, weights, ids)
    call = FusedExpertsCall.from_op(
        x.double(), weights.double(), ids, experts.weights, None, None, experts.layout.to_tensor(),
        None, "silu", False,
    )  # fmt: skip
    expected = reference.run(call, torch.float64)
    assert relative_error(result, expected) < runner.errors[torch.float32]


def _outlier_tokens(count: int, hidden: int) -> torch.Tensor:
    """Gaussian, with 1 % of the channels 20 times as large."""
    x = random_tokens(count, hidden)
    channels = torch.randperm(hidden, generator=torch.Generator().manual_seed(4))
    x[:, channels[: max(1, hidden // 100)]] *= 20
    return x


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(
    ("precision", "gaussian_limit", "outlier_limit"),
    [("int16", 3e-4, 3e-4), ("int8", INT8_ERROR, 6e-2)],
)
def test_error_of_the_activation_precision(
    runner: Runner,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    gaussian_limit: float,
    outlier_limit: float,
    outliers: bool,
) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", precision)
    experts = random_experts([4, 3, 2], [4, 3, 2], 128, 1024, 512)
    x = _outlier_tokens(16, 1024) if outliers else random_tokens(16, 1024)
    weights, ids = random_routing(16, experts=3)
    error = relative_error(
        runner.run(experts, x, weights, ids), expected_output(experts, x, weights, ids)
    )
    assert error < (outlier_limit if outliers else gaussian_limit)
    if precision == "int8":
        assert error > 1e-3, "int8 activations were not used"


def test_bfloat16_error_is_below_the_documented_limit(runner: Runner) -> None:
    experts = random_experts([4, 3, 2], [4, 3, 2], 128, 1024, 512)
    for x in (random_tokens(16, 1024), _outlier_tokens(16, 1024)):
        x, (weights, ids) = x.bfloat16(), random_routing(16, experts=3)
        error = relative_error(
            runner.run(experts, x, weights, ids), expected_output(experts, x, weights, ids)
        )
        assert error < 3e-3


@both_precisions
@pytest.mark.parametrize("count", [1, 7, 40])
def test_equal_bits_at_any_number_of_threads(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, precision: str, count: int
) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", precision)
    experts = random_experts(*MIXED, 64, HIDDEN, INTERMEDIATE)
    x, (weights, ids) = random_tokens(count), random_routing(count)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(runner.run(experts, x, weights, ids))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    experts = random_experts(*MIXED, 64, HIDDEN, INTERMEDIATE)
    weights = cpu.prepare(experts.weights, experts.layout, "silu")
    layout = experts.layout.to_tensor()
    topk_weights, ids = random_routing(20)
    inputs = [random_tokens(20, seed=seed) for seed in range(16)]

    def run(x: torch.Tensor) -> torch.Tensor:
        return cpu.run(FusedExpertsCall.from_op(
            x, topk_weights, ids, weights, None, None, layout, None, "silu", False
        ))  # fmt: skip

    alone = [run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, inputs))
    assert all(map(torch.equal, alone, together))


def test_a_token_gets_the_same_bits_alone_and_in_a_batch(runner: Runner) -> None:
    experts = random_experts(*MIXED, 64, HIDDEN, INTERMEDIATE)
    x, (weights, ids) = random_tokens(40), random_routing(40)
    together = runner.run(experts, x, weights, ids)
    alone = [
        runner.run(experts, x[i : i + 1], weights[i : i + 1], ids[i : i + 1]) for i in range(40)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others(
    runner: Runner, bad: float
) -> None:
    experts = random_experts(*MIXED, 64, HIDDEN, INTERMEDIATE)
    x, (weights, ids) = random_tokens(6), random_routing(6)
    good = runner.run(experts, x, weights, ids)
    broken = x.clone()
    broken[2, 17] = bad
    result = runner.run(experts, broken, weights, ids)
    assert result[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(result[others], good[others])


@pytest.mark.parametrize("scale", [0.0, 1e-37, 1e30])
def test_tokens_at_the_ends_of_the_range(runner: Runner, scale: float) -> None:
    experts = random_experts(*MIXED, 64, HIDDEN, INTERMEDIATE, gated=False)
    x, (weights, ids) = scale * random_tokens(6), random_routing(6)
    result = runner.run(experts, x, weights, ids, "relu_no_mul")
    expected = expected_output(experts, x, weights, ids, "relu_no_mul")
    assert (result.double() - expected).norm() <= 4e-4 * expected.norm() + 1e-28


def test_weights_that_were_not_prepared_are_refused() -> None:
    experts = random_experts(*MIXED, 32, HIDDEN)
    weights, ids = random_routing(6)
    layout = experts.layout.to_tensor()
    call = FusedExpertsCall.from_op(
        random_tokens(6), weights, ids, experts.weights, None, None, layout, None, "silu", False
    )
    with pytest.raises(ValueError, match="are the weights prepared for this kernel"):
        cpu.run(call)


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("change", ["shorter", "longer", "type"])
def test_weights_that_do_not_fit_the_layout_are_not_read(place: int, change: str) -> None:
    experts = random_experts(*MIXED, 32, HIDDEN)
    weights = [*experts.weights]
    lying = weights[place]
    if change == "type":
        lying = lying.to(torch.int32)
    else:
        lying = lying[:-1] if change == "shorter" else torch.cat([lying, lying[:1]])
    weights[place] = lying
    with pytest.raises(ValueError, match="weights of w.* the layout says"):
        cpu.prepare(ExpertWeights(*weights), experts.layout, "silu")


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 33}, {"group_size": 64}, {"hidden_size": 512}, {"intermediate_size": 64},
        {"w13_rows": 512},
    ],
)  # fmt: skip
def test_layouts_that_lie_are_refused(change: dict[str, Any]) -> None:
    experts = random_experts(*MIXED, 32, HIDDEN)
    with pytest.raises(ValueError, match="layout says|columns in groups|lies at"):
        cpu.prepare(experts.weights, replace(experts.layout, **change), "silu")
    first, *others = experts.layout.slots
    for slot in (first._replace(w2_offset=8), first._replace(w13_bits=8)):
        with pytest.raises(ValueError, match="lies at"):
            lying = replace(experts.layout, slots=(slot, *others))
            cpu.prepare(experts.weights, lying, "silu")


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
