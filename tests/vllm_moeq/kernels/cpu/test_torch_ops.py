"""The ops in C++ against the same ops in Python: which of them runs, and that nobody sees which."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from support.experts import prepared, random_experts
from support.kernels import random_routing, random_tokens
from support.linear import random_layer
from vllm_moeq.kernels.cpu import torch_ops

HIDDEN, EXPERTS = 128, 4

pytestmark = pytest.mark.usefixtures("ops")


@pytest.fixture(scope="module")
def ops() -> None:
    """Skip where the ops cannot be compiled: Python is all there is then."""
    prepared(random_experts([2], [2]), "cpu")
    if torch_ops._load() is None:
        pytest.skip("needs a compiler, and torch's headers")


def _experts(**changes: Any) -> list[Any]:
    """Return arguments of the op, by default those of a call that vLLM makes."""
    activation = changes.pop("activation", "silu")
    experts = random_experts([1, 2, 3, 8], [4, 3, 2, 1], gated="no_mul" not in activation)
    weights, layout = prepared(experts, changes.pop("kernel", "cpu"), activation)
    topk_weights, topk_ids = random_routing(5, experts=EXPERTS)
    arguments = {
        "x": random_tokens(5, HIDDEN), "topk_weights": topk_weights, "topk_ids": topk_ids.int(),
        "weights": weights, "w13_bias": None, "w2_bias": None, "layout": layout,
        "expert_map": None, "activation": activation, "on_input": False, "limit": None,
        "alpha": None, "beta": None,
    }  # fmt: skip
    assert not changes.keys() - arguments.keys()
    return list((arguments | changes).values())


def _run(name: str, arguments: list[Any]) -> tuple[torch.Tensor, bool]:
    """Return what an op gives, and whether Python was in it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = getattr(torch.ops.moeq, name)(*arguments)
    seen = {event.name for event in profiler.events()}
    assert f"moeq::{name}" in seen
    return result, f"moeq::{name}_in_python" in seen


def _assert_the_same(name: str, arguments: list[Any], *, in_python: bool = False) -> None:
    result, was_in_python = _run(name, arguments)
    expected = getattr(torch.ops.moeq, f"{name}_in_python")(*arguments)
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    assert result.is_contiguous()
    assert torch.equal(result, expected)
    assert was_in_python == in_python


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *({"x": random_tokens(5, HIDDEN, dtype)} for dtype in (torch.bfloat16, torch.float16)),
        {"x": random_tokens(HIDDEN, 5).T},
        {"x": random_tokens(0, HIDDEN), "topk_weights": torch.ones(0, 2),
         "topk_ids": torch.zeros(0, 2, dtype=torch.int32)},
        {"topk_ids": torch.tensor([[0, 1], [2, 3], [-1, 2], [1, 0], [3, -(2**40)]])},
        {"topk_weights": torch.rand(2, 5).T.bfloat16()},
        {"w13_bias": torch.randn(EXPERTS, 256).bfloat16(), "w2_bias": torch.randn(EXPERTS, HIDDEN)},
        {"expert_map": torch.tensor([1, -1, 0, 2])},
        {"on_input": True},
        *({"activation": name} for name in ("gelu", "gelu_tanh", "relu2_no_mul", "swigluoai")),
        {"limit": 1.5},
        {"limit": 7.0, "alpha": 1.5, "beta": 0.5, "activation": "swigluoai"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["int16", "int8"])
def test_experts_without_python_give_the_same_bits(
    changes: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", precision)
    _assert_the_same("fused_experts", _experts(**changes))


@pytest.mark.parametrize(
    "changes",
    [{"kernel": "reference"}, {"x": random_tokens(5, HIDDEN, torch.float64)}],
)
def test_what_is_not_the_kernels_goes_through_python(changes: dict[str, Any]) -> None:
    _assert_the_same("fused_experts", _experts(**changes), in_python=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": random_tokens(4, HIDDEN)}, "4 tokens with router weights"),
        ({"x": random_tokens(5, HIDDEN // 2)}, "hidden_size is 128"),
        ({"x": random_tokens(1, HIDDEN)[0]}, "no matrices"),
        ({"topk_ids": torch.full((5, 2), EXPERTS)}, "only 4 local experts"),
        ({"expert_map": torch.tensor([0, 1])}, "a map of 2"),
        ({"w2_bias": torch.ones(EXPERTS, 1)}, "w2_bias is"),
        ({"activation": "gelu", "alpha": 1.0}, "has no limit, alpha or beta"),
    ],
)
def test_what_is_wrong_is_said_in_pythons_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.moeq.fused_experts(*_experts(**changes))


def test_an_unknown_activation_and_a_wrong_precision_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = _experts()
    with pytest.raises(ValueError, match="'tanh' is not one of"):
        torch.ops.moeq.fused_experts(*arguments[:8], "tanh", *arguments[9:])
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", "int4")
    with pytest.raises(ValueError, match="MOEQ_CPU_ACTIVATION"):
        torch.ops.moeq.fused_experts(*arguments)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "x",
    [
        random_tokens(3, 256),
        random_tokens(1, 256, torch.bfloat16)[0],
        random_tokens(6, 256, torch.float16).view(2, 3, 256),
        random_tokens(256, 3).T,
        random_tokens(0, 256),
    ],
)
def test_dense_layers_without_python_give_the_same_bits(
    x: torch.Tensor, bias: torch.dtype | None, bits: int
) -> None:
    weight, layout = random_layer(72, 256, bits).prepared("cpu")
    row_bias = None if bias is None else random_tokens(1, 72, bias)[0]
    _assert_the_same("linear", [x, *weight, row_bias, layout, 72])


def test_dense_layers_of_the_reference_go_through_python() -> None:
    weight, layout = random_layer(72, 256, 4).prepared("reference")
    arguments = [random_tokens(3, 256), *weight, None, layout, 72]
    _assert_the_same("linear", arguments, in_python=True)


@pytest.mark.parametrize(
    ("columns", "rows", "bias", "message"),
    [
        (128, 72, None, "do not fit the layout"),
        (256, 64, None, "do not fit the layout"),
        (256, 72, torch.ones(64), "the bias is"),
    ],
)
def test_what_is_wrong_with_a_dense_layer_is_said_in_pythons_words(
    columns: int, rows: int, bias: torch.Tensor | None, message: str
) -> None:
    weight, layout = random_layer(72, 256, 4).prepared("cpu")
    with pytest.raises(ValueError, match=message):
        torch.ops.moeq.linear(random_tokens(3, columns), *weight, bias, layout, rows)
