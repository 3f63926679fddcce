"""Router norm change: values against float64, and every source of an initial router."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moeq.checkpoint import SourceModel
from moeq.errors import MoeqError
from moeq.signals import load_base_routers, router_norms
from moeq.tracker import RouterNormTracker
from support.checkpoints import (
    HIDDEN,
    NUM_EXPERTS,
    ROUTERS,
    Tensors,
    mixtral_tensors,
    write_checkpoint,
)

IN_MEMORY = ("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight")


@pytest.fixture
def model(tmp_path: Path) -> SourceModel:
    return SourceModel.open(write_checkpoint(tmp_path / "final", mixtral_tensors()))


@pytest.fixture
def initial() -> Tensors:
    """The routers before training, by their names on disk."""
    return {name: mixtral_tensors(seed=1)[name] for name in ROUTERS}


def _norms(router: torch.Tensor) -> np.ndarray:
    return np.sqrt((router.double().numpy() ** 2).sum(1))


def _check_changes(model: SourceModel, source: Path, initial: Tensors) -> None:
    layers = model.layers
    base = load_base_routers(str(source), layers)
    for layer, name in zip(layers, ROUTERS, strict=True):
        result = router_norms(model, layer, base)
        expected = _norms(mixtral_tensors()[name]) - _norms(initial[name])
        np.testing.assert_allclose(result.values, expected, atol=1e-5)
        assert not result.surrogate


def test_initial_router_from_a_checkpoint(
    model: SourceModel, initial: Tensors, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "base", mixtral_tensors(seed=1), shards=3)
    _check_changes(model, base, initial)


def test_initial_router_from_a_file_with_routers_only(
    model: SourceModel, initial: Tensors, tmp_path: Path
) -> None:
    save_file(initial, tmp_path / "routers.safetensors")
    _check_changes(model, tmp_path / "routers.safetensors", initial)


def test_initial_router_by_its_name_in_memory(
    model: SourceModel, initial: Tensors, tmp_path: Path
) -> None:
    renamed = dict(zip(IN_MEMORY, initial.values(), strict=True))
    # A shared expert's gate is no router.
    renamed["model.layers.0.mlp.shared_expert_gate.weight"] = torch.zeros(1, HIDDEN)
    save_file(renamed, tmp_path / "routers.safetensors")
    _check_changes(model, tmp_path / "routers.safetensors", initial)


def test_initial_router_from_the_trackers_file(
    model: SourceModel, initial: Tensors, tmp_path: Path
) -> None:
    trained: Any = nn.Module()
    trained.model = nn.Module()
    trained.model.layers = nn.ModuleList()
    for name in ROUTERS:
        block: Any = nn.Module()
        block.mlp = nn.Module()
        block.mlp.experts = nn.ModuleList()
        block.mlp.gate = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
        block.mlp.gate.weight.data = initial[name].clone()
        trained.model.layers.append(block)
    path = tmp_path / "tracked.safetensors"
    tracker = RouterNormTracker(path, trained)
    for block in trained.model.layers:
        block.mlp.gate.weight.data.mul_(7)
    tracker.step()
    tracker.save()
    _check_changes(model, path, initial)


def test_without_an_initial_router_the_final_norm_stands_in(model: SourceModel) -> None:
    for layer, name in zip(model.layers, ROUTERS, strict=True):
        result = router_norms(model, layer, None)
        np.testing.assert_allclose(result.values, _norms(mixtral_tensors()[name]), rtol=1e-5)
        assert result.surrogate


def test_an_initial_router_of_another_shape_is_named(
    model: SourceModel, initial: Tensors, tmp_path: Path
) -> None:
    initial[ROUTERS[1]] = torch.zeros(NUM_EXPERTS + 1, HIDDEN)
    save_file(initial, tmp_path / "routers.safetensors")
    layers = model.layers
    base = load_base_routers(str(tmp_path / "routers.safetensors"), layers)
    with pytest.raises(MoeqError, match=rf"{ROUTERS[1]} has shape \[5, 64\].*\[4, 64\]"):
        router_norms(model, layers[1], base)


@pytest.mark.parametrize("suffix", ["file", "checkpoint"])
def test_a_missing_layer_is_named(
    model: SourceModel, initial: Tensors, tmp_path: Path, suffix: str
) -> None:
    del initial[ROUTERS[1]]
    if suffix == "file":
        source = tmp_path / "routers.safetensors"
        save_file(initial, source)
    else:
        source = write_checkpoint(tmp_path / "base", initial)
    with pytest.raises(MoeqError, match=f"{source}: found nothing.*{ROUTERS[1]}"):
        load_base_routers(str(source), model.layers)


def test_two_candidates_for_a_layer_are_refused(
    model: SourceModel, initial: Tensors, tmp_path: Path
) -> None:
    router = initial.pop(ROUTERS[0])
    save_file(
        {
            **initial,
            "encoder.layers.0.mlp.gate.weight": router,
            "decoder.layers.0.mlp.gate.weight": router.clone(),
        },
        tmp_path / "routers.safetensors",
    )
    with pytest.raises(MoeqError, match="several candidates"):
        load_base_routers(str(tmp_path / "routers.safetensors"), model.layers)


def test_a_file_that_is_no_safetensors_file_is_named(model: SourceModel, tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    path.write_bytes(b"no tensors in here")
    with pytest.raises(MoeqError, match=f"`base_router` {path} is no safetensors file"):
        load_base_routers(str(path), model.layers)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["final", "initial"])
def test_routers_that_are_not_finite_are_named(
    tmp_path: Path, initial: Tensors, which: str, bad: float
) -> None:
    tensors = mixtral_tensors()
    (tensors if which == "final" else initial)[ROUTERS[0]][2, 5] = bad
    model = SourceModel.open(write_checkpoint(tmp_path, tensors))
    with pytest.raises(MoeqError, match=ROUTERS[0]):
        router_norms(model, model.layers[0], initial)
