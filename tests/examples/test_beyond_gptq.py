"""The experiments beside GPTQ: against float64, transformers and the product itself."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moeq.calibration.calibration import Calibration

from moeq.allocation import PlanOptions, make_plan
from moeq.checkpoint.families import expert_widths
from moeq.model.layerwise import ExpertMatrices, Routed
from moeq.rounding import Hessian, QuantizedWeight, quantize_rtn
from vllm_moeq.format import BitPlan

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
GROUP = 32


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Any:
    from plan_quality import PlannedModel

    return PlannedModel(tiny_model("mixtral"))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 320, (16, 32), generator=torch.Generator().manual_seed(0))


def _plan(model: Any, bits: float = 2.5) -> BitPlan:
    options = PlanOptions(bits, (3, 2) if bits % 1 else None, "random:0", GROUP)
    return make_plan(model.reader, model.layers, options, "test")


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rounded_to_nearest(model: Any, plan: BitPlan) -> dict[str, QuantizedWeight]:
    widths = expert_widths(plan, model.layers)
    return {
        name: quantize_rtn(model.reader.tensor(name), bits, GROUP) for name, bits in widths.items()
    }


def test_fitting_to_the_residual_stream_is_the_product(
    model: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    from layerwise_rounding import Method, Target, round_experts

    plan = _plan(model)
    product = Calibration(model.reader, model.layers, plan, tokens)
    product.run(tmp_path / "calibration", resume=False, progress=False)
    stored = product.stored(tmp_path / "calibration")
    rounded, plain = (
        round_experts(model.reader, model.layers, plan, tokens, Method(target=target))
        for target in (Target.RESIDUAL, Target.MATRIX)
    )
    assert not rounded.routers
    for name, bits in expert_widths(plan, model.layers).items():
        theirs = QuantizedWeight(*stored(name).values()).dequantize(bits)
        ours, others = (found.weights[name].dequantize(bits) for found in (rounded, plain))
        difference = (ours - theirs).norm()
        if ".layers.0." not in name:  # a last bit turns a code over, and that others
            assert difference < 0.7 * (ours - others).norm(), name
        elif ".w2." in name:
            assert difference < 0.01 * theirs.norm() < 0.1 * (ours - others).norm(), name
        else:
            assert torch.equal(ours, theirs), name


def test_fitted_router_undoes_a_change_of_its_inputs() -> None:
    from layerwise_rounding import fitted_router

    weight, x = _random(4, 8), _random(200, 8, seed=1)
    changed = x @ (torch.eye(8) + 0.1 * _random(8, 8, seed=2))
    before = (changed @ weight.T - x @ weight.T).norm()
    after = (changed @ fitted_router(weight, changed, x).T - x @ weight.T).norm()
    assert after < 0.15 * before


@pytest.mark.parametrize("target", ["EXPERT", "STREAM", "RESIDUAL"])
def test_fitted_targets_bring_the_outputs_nearer_to_the_original(
    target: str, model: Any, tokens: torch.Tensor
) -> None:
    from layerwise_rounding import Method, Target, round_experts

    def nearest(weights: torch.Tensor, _: Hessian, *grid: int) -> list[QuantizedWeight]:
        return [quantize_rtn(weight, *grid) for weight in weights]

    plan = _plan(model, 3)
    with torch.inference_mode():
        original = model.model(tokens).logits
        errors = {}
        for name in ("MATRIX", target):
            method = Method(nearest, Target[name])
            weights = round_experts(model.reader, model.layers, plan, tokens, method).weights
            model.fill(lambda name, weights=weights: weights[name].dequantize(3))
            errors[name] = (model.model(tokens).logits - original).norm()
    assert errors[target] < 0.97 * errors["MATRIX"]


def _block(weights: list[ExpertMatrices], routed: Routed) -> torch.Tensor:
    """Return a block's output in float64, token by token."""
    output = torch.zeros_like(routed.x, dtype=torch.float64)
    for token, x in enumerate(routed.x.double()):
        for expert, share in zip(routed.ids[token], routed.weights[token], strict=True):
            gate, up, down = (matrix.double() for matrix in weights[expert])
            output[token] += share.double() * (down @ (F.silu(gate @ x) * (up @ x)))
    return output


def test_learned_rounding_lowers_the_error_of_the_block() -> None:
    from learned_rounding import LearnedExpert, learn_rounding

    hidden, inner, experts = 32, 64, 3
    originals = [
        ExpertMatrices(
            _random(inner, hidden, seed=e), _random(inner, hidden, seed=e + 10),
            _random(hidden, inner, seed=e + 20),
        )
        for e in range(experts)
    ]  # fmt: skip
    scores = _random(300, experts, seed=30).softmax(-1).topk(2, dim=-1)
    routed = Routed(_random(300, hidden, seed=31), scores.indices, scores.values)
    wanted = _block(originals, routed)
    learned = [
        LearnedExpert.of(
            matrices, tuple(quantize_rtn(matrix, bits, GROUP) for matrix, bits in
            zip(matrices, (2, 2, 3), strict=True)), (2, 3),
        )
        for matrices in originals
    ]  # fmt: skip

    def stored() -> list[ExpertMatrices]:
        return [
            ExpertMatrices(
                *(w.dequantize(b) for w, b in zip(expert.stored(), (2, 2, 3), strict=True))
            )
            for expert in learned
        ]

    for matrices, now in zip(originals, stored(), strict=True):
        for matrix, weight, bits in zip(matrices, now, (2, 2, 3), strict=True):
            assert torch.equal(weight, quantize_rtn(matrix, bits, GROUP).dequantize(bits))
    before = (_block(stored(), routed) - wanted).norm()
    learn_rounding(
        learned, lambda gate, up, x: F.silu(x @ gate.T) * (x @ up.T), routed, wanted.float(), 60
    )
    for expert, now in zip(learned, stored(), strict=True):
        # What is stored is what was learned, but for the rounding of scales to float16.
        assert torch.allclose(expert.down.weight(), now.down, rtol=2**-10, atol=1e-6)
    assert (_block(stored(), routed) - wanted).norm() < 0.8 * before


def test_learned_scales_start_as_the_stored_weights_where_transformers_has_them(
    model: Any,
) -> None:
    from distillation import LearnedScales

    plan = _plan(model, 3)
    stored = _rounded_to_nearest(model, plan)
    scales = LearnedScales(model.layers, plan, stored)
    model.fill(lambda name: stored[name].dequantize(3))
    parameters = dict(model.model.model.named_parameters())
    for name, weight in scales.weights().items():
        assert torch.equal(weight, parameters[name]), name
    for log in scales.logs.values():
        log.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    after = scales.stored()
    model.fill(lambda name: after[name].dequantize(3))
    for name, weight in scales.weights().items():
        assert torch.allclose(weight, parameters[name], rtol=2**-10, atol=1e-6), name
        assert not torch.allclose(weight, scales._steps[name].flatten(2), rtol=0.01)


@pytest.mark.parametrize("rates", [(1e-2, 0.0), (0.0, 3e-3)], ids=["scales", "routers"])
def test_distillation_brings_the_distribution_nearer(
    rates: tuple[float, float], model: Any, tokens: torch.Tensor
) -> None:
    from distillation import LearnedScales, distill, last_hidden

    plan = _plan(model, 2)
    stored = _rounded_to_nearest(model, plan)
    with torch.no_grad():
        original = model.model(tokens).logits.log_softmax(-1)
    teacher = last_hidden(model, tokens)
    scales = LearnedScales(model.layers, plan, stored)
    parameters = dict(model.model.model.named_parameters())
    # Damaged, so that there is something to learn.
    routers = {
        name: parameter.detach() + 0.05 * _random(*parameter.shape)
        for name, parameter in parameters.items()
        if name.endswith("mlp.gate.weight")
    }

    def divergence() -> torch.Tensor:
        after = scales.stored()
        model.fill(lambda name: after[name].dequantize(2))
        with torch.no_grad():
            for name, router in routers.items():
                parameters[name].copy_(router)
            now = model.model(tokens).logits.log_softmax(-1)
        return F.kl_div(now, original, log_target=True, reduction="sum")

    before = divergence()
    untouched = {name: router.clone() for name, router in routers.items()}
    distill(model, tokens, teacher, scales, routers, rates, steps=30)
    assert divergence() < 0.97 * before
    assert rates[0] or all(not log.any() for log in scales.logs.values())
    assert rates[1] or all(torch.equal(routers[name], untouched[name]) for name in routers)
