"""Whole plans: widths follow the signals of the checkpoint, sizes follow the widths."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moeq
from moeq.checkpoint import SourceModel
from moeq.errors import MoeqError
from moeq.planning import decide
from moeq.requests import PlanRequest
from support.checkpoints import (
    CONTAINERS,
    HIDDEN,
    INTERMEDIATE,
    NUM_EXPERTS,
    OTHER_WEIGHTS,
    ROUTERS,
    mixtral_tensors,
    write_checkpoint,
)
from support.models import ENCODER_DECODERS, FAMILIES
from support.sources import load
from vllm_moeq.format import BitPlan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose signals are known: see the orders below."""
    tensors = mixtral_tensors()
    # Norms of the router rows, and deviations of w1, per layer and expert.
    norms = [[4.0, 1, 3, 2], [1.0, 2, 3, 4]]
    deviations = [[1.0, 1, 1, 1], [1.0, 1, 1, 4]]
    for layer, (container, router) in enumerate(zip(CONTAINERS, ROUTERS, strict=True)):
        rows = torch.tensor(norms[layer]).unsqueeze(1)
        tensors[router] = torch.nn.functional.normalize(torch.ones(NUM_EXPERTS, HIDDEN)) * rows
        for expert in range(NUM_EXPERTS):
            signs = torch.ones(INTERMEDIATE, HIDDEN)
            signs[:, ::2] = -1
            tensors[f"{container}.{expert}.w1.weight"] = signs * deviations[layer][expert]
    return write_checkpoint(tmp_path_factory.mktemp("model"), tensors)


def _plan(folder: Path, **options: object) -> BitPlan:
    asked = {"bits": 2.5, "group_size": 64, "calib": None, **options}
    request = PlanRequest(model=str(folder), **asked)  # type: ignore[arg-type]
    return decide(SourceModel.open(folder), request, None).plan


def _widths(plan: BitPlan) -> list[tuple[int, ...]]:
    assert all(bits.w13 == bits.w2 for bits in plan.expert_bits.values())
    return [plan.expert_bits[container].w13 for container in CONTAINERS]


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"strategy": "router-norm"}, [(2, 3, 2, 3), (3, 3, 2, 2)]),
        # The last expert of layer 1 is noisy (variance 16 against 1) and overtakes all.
        ({"strategy": "combined"}, [(2, 3, 2, 3), (3, 2, 2, 3)]),
        ({"strategy": "combined", "zeta": 17.0}, [(2, 3, 2, 3), (3, 3, 2, 2)]),
        ({"strategy": "maxvar"}, [(3, 3, 2, 2), (3, 2, 2, 3)]),
        ({"strategy": "uniform", "bits": 3}, [(3, 3, 3, 3), (3, 3, 3, 3)]),
        ({"strategy": "router-norm", "bits": 8}, [(8, 8, 8, 8), (8, 8, 8, 8)]),
        ({"strategy": "router-norm", "bits": 5}, [(4, 8, 4, 4), (8, 4, 4, 4)]),
        ({"strategy": "router-norm", "levels": (3, 2, 1)}, [(1, 3, 3, 3), (3, 3, 3, 1)]),
        ({"strategy": "router-norm", "levels": (4, 1)}, [(1, 4, 1, 4), (4, 4, 1, 1)]),
    ],
)
def test_widths_follow_the_signals(
    folder: Path, options: dict[str, object], widths: list[tuple[int, ...]]
) -> None:
    assert _widths(_plan(folder, **options)) == widths


def test_initial_router_turns_the_order(folder: Path, tmp_path: Path) -> None:
    # Initial norms 3.9, 0.5, 2, 0 make changes 0.1, 0.5, 1, 2 in layer 0.
    tensors = mixtral_tensors()
    for router in ROUTERS:
        rows = torch.tensor([[3.9], [0.5], [2.0], [0.0]])
        tensors[router] = torch.nn.functional.normalize(torch.ones(NUM_EXPERTS, HIDDEN)) * rows
    base = write_checkpoint(tmp_path / "base", tensors)
    plan = _plan(folder, strategy="router-norm", base_router=str(base))
    assert _widths(plan)[0] == (3, 3, 2, 2)
    assert plan.provenance.details["router_signal"] == "norm change"


def test_surrogate_is_recorded(folder: Path) -> None:
    assert "surrogate" in _plan(folder).provenance.details["router_signal"]


def test_random_plans_repeat_with_their_seed(folder: Path) -> None:
    plans = {seed: _widths(_plan(folder, strategy=f"random:{seed}")) for seed in range(20)}
    assert all(_widths(_plan(folder, strategy=f"random:{s}")) == plans[s] for s in range(20))
    assert len({str(widths) for widths in plans.values()}) > 5


def test_random_plans_keep_the_average(folder: Path) -> None:
    for layer in _widths(_plan(folder, strategy="random:3")):
        assert sorted(layer) == [2, 2, 3, 3]


@pytest.mark.parametrize(("bits", "achieved"), [(2.5, 2.5), (2.6, 2.5), (2.3, 2.25)])
def test_requested_and_achieved_bits_are_stated(folder: Path, bits: float, achieved: float) -> None:
    provenance = _plan(folder, bits=bits).provenance
    assert (provenance.requested_bits, provenance.achieved_bits) == (bits, achieved)


def test_sizes_are_those_of_the_format(folder: Path) -> None:
    provenance = _plan(folder).provenance
    weights = 2 * NUM_EXPERTS * 3 * HIDDEN * INTERMEDIATE
    # Three bytes of scale and zero point for each group of 64.
    expert_bytes = weights * 5 // 16 + weights // 64 * 3
    routers, others = 2 * NUM_EXPERTS * HIDDEN * 4, OTHER_WEIGHTS * 2
    assert provenance.expert_bytes == expert_bytes
    assert provenance.bits_per_weight == pytest.approx(2.5 + 24 / 64)
    assert provenance.total_bytes == expert_bytes + routers + others


def test_provenance_tells_how_the_plan_was_made(folder: Path) -> None:
    plan = _plan(folder, maxvar="highest-norm-row", zeta=2.0, reorder="one-pass", levels=(4, 2))
    assert plan.provenance.strategy == "combined"
    assert plan.provenance.source == folder.name
    expected = {"maxvar": "highest-norm-row", "zeta": 2.0, "reorder": "one-pass", "levels": [4, 2]}
    assert expected.items() <= plan.provenance.details.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "`strategy` best is not one of"),
        ({"strategy": "random:x"}, "SEED"),
        ({"strategy": "random:"}, "SEED"),
        ({"strategy": f"random:{2**63}"}, "SEED"),
        ({"strategy": "random"}, "`strategy` random is not one of"),
        ({"strategy": "maxvar", "zeta": 5.0}, "`zeta` has no effect with `strategy` maxvar"),
        ({"strategy": "router-norm", "maxvar": "highest-norm-row"}, "`maxvar` has no effect"),
        ({"strategy": "random:0", "reorder": "one-pass"}, "`reorder` has no effect"),
        ({"strategy": "uniform"}, "`strategy` uniform needs `bits` to be one width"),
        ({"strategy": "uniform", "bits": 3, "levels": (4, 2)}, "`levels`"),
        ({"strategy": "uniform", "bits": 3, "base_router": "x"}, "`base_router` has no effect"),
        ({"bits": 0.5}, "`bits` 0.5"),
        ({"bits": 9}, "`bits` 9"),
        ({"bits": float("nan")}, "`bits` nan"),
        ({"levels": (7, 2)}, "`levels` 7 is not one of"),
        ({"levels": (2, 3)}, "highest first"),
        ({"group_size": 48}, "`group_size` 48 is not one of"),
        ({"group_size": 128}, "`group_size` 128 does not divide the hidden_size 64"),
        ({"zeta": 0.5}, "`zeta` 0.5"),
        ({"maxvar": "mean"}, "`maxvar` mean"),
        ({"reorder": "twice"}, "`reorder` twice"),
        ({"base_router": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_options_are_named(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plan(folder, **options)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *ENCODER_DECODERS])
def test_every_family_is_planned(tiny_model: Callable[[str], Path], family: str) -> None:
    model = tiny_model(family)
    stored = load(model)
    by_norm, by_both = (
        moeq.plan(model, bits=2.5, calib=None, strategy=name)
        for name in ("router-norm", "combined")
    )
    layers = SourceModel.open(model).layers
    assert by_norm.expert_bits.keys() == {layer.container for layer in layers}
    for layer in layers:
        router = next(
            t for n, t in stored.items() if layer.family.canonical_name(n) == layer.router
        )
        norms = router.double().norm(dim=1)
        widths = torch.tensor(by_norm.expert_bits[layer.container].w13)
        assert sorted(widths.tolist()) == [2] * 4 + [3] * 4
        assert norms[widths == 3].max() <= norms[widths == 2].min()
        assert sorted(by_both.expert_bits[layer.container].w2) == [2] * 4 + [3] * 4


def test_one_level_smaller_than_the_average_is_refused(folder: Path) -> None:
    with pytest.raises(MoeqError, match="`bits` 2.5 is outside of `levels` 2"):
        _plan(folder, levels=(2,))
