"""The router tracker in a plain loop and under transformers' own callback handler."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from moeq import RouterNormTracker
from moeq.checkpoint import SourceModel
from moeq.signals import load_base_routers, router_norms

EXPERTS, HIDDEN = 4, 16


@pytest.fixture
def model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            output_router_logits=True,
        )
    )


def _routers(model: MixtralForCausalLM) -> dict[str, torch.Tensor]:
    return {
        f"model.layers.{index}.mlp.gate.weight": layer.mlp.gate.weight.detach().clone()
        for index, layer in enumerate(model.model.layers)
    }


def _train_step(model: MixtralForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.randint(0, 32, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _assert_initial(path: Path, expected: dict[str, torch.Tensor]) -> None:
    stored = load_file(path)
    assert all(torch.equal(stored[name], router) for name, router in expected.items())


def test_a_plain_loop_records_initial_routers_and_norms(
    model: MixtralForCausalLM, tmp_path: Path
) -> None:
    path, initial = tmp_path / "routers.safetensors", _routers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tracker = RouterNormTracker(path, model, every=2)
    history = {0: initial}
    for step in range(1, 6):
        _train_step(model, optimizer)
        tracker.step()
        history[step] = _routers(model)
    tracker.save()
    _assert_initial(path, initial)
    stored = load_file(path)
    # Every second step, and the last one.
    steps = [0, 2, 4, 5]
    assert stored["norm_history.steps"].tolist() == steps
    for name in initial:
        norms = [history[step][name].double().square().sum(1).sqrt() for step in steps]
        assert len({str(row.tolist()) for row in norms}) == len(steps)
        torch.testing.assert_close(stored[f"{name}.norm_history"].double(), torch.stack(norms))


def test_saving_twice_records_a_step_once(model: MixtralForCausalLM, tmp_path: Path) -> None:
    tracker = RouterNormTracker(tmp_path / "routers.safetensors", model)
    tracker.step()
    tracker.save()
    tracker.save()
    steps = load_file(tmp_path / "routers.safetensors")["norm_history.steps"]
    assert steps.tolist() == [0, 1]


def test_a_killed_training_leaves_the_initial_routers(
    model: MixtralForCausalLM, tmp_path: Path
) -> None:
    path, initial = tmp_path / "routers.safetensors", _routers(model)
    tracker = RouterNormTracker(path, model)
    _train_step(model, torch.optim.SGD(model.parameters(), lr=0.5))
    tracker.step()
    del tracker
    _assert_initial(path, initial)


def test_no_partial_file_stays(model: MixtralForCausalLM, tmp_path: Path) -> None:
    RouterNormTracker(tmp_path / "routers.safetensors", model).save()
    assert [path.name for path in tmp_path.iterdir()] == ["routers.safetensors"]


def test_wrappers_do_not_show_in_names(model: MixtralForCausalLM, tmp_path: Path) -> None:
    wrapped: Any = torch.nn.Module()
    wrapped.module = torch.compile(model)
    RouterNormTracker(tmp_path / "routers.safetensors", wrapped)
    _assert_initial(tmp_path / "routers.safetensors", _routers(model))


def test_initial_routers_are_stored_in_float32(model: MixtralForCausalLM, tmp_path: Path) -> None:
    RouterNormTracker(tmp_path / "routers.safetensors", model.bfloat16())
    stored = load_file(tmp_path / "routers.safetensors")
    assert stored["model.layers.0.mlp.gate.weight"].dtype == torch.float32


def _trainer(model: MixtralForCausalLM, folder: Path, max_steps: int) -> Trainer:
    tokens = torch.randint(32, (12, 8))
    return Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder / "run"),
            max_steps=max_steps,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[RouterNormTracker(folder / "routers.safetensors", every=2)],
    )


def test_a_resumed_trainer_keeps_the_initial_routers(
    model: MixtralForCausalLM, tmp_path: Path
) -> None:
    path, initial = tmp_path / "routers.safetensors", _routers(model)
    _trainer(model, tmp_path, max_steps=3).train()

    # A new process would have a new tracker and a new trainer; its last checkpoint is of step 3.
    _trainer(model, tmp_path, max_steps=5).train(resume_from_checkpoint=True)

    _assert_initial(path, initial)
    written = load_file(path)
    assert written["norm_history.steps"].tolist() == [0, 2, 3, 4, 5]
    for name, final in _routers(model).items():
        torch.testing.assert_close(written[f"{name}.norm_history"][-1], final.norm(dim=1))


def test_resuming_without_the_file_is_refused(model: MixtralForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training resumes at step 7, but"):
        RouterNormTracker(tmp_path / "routers.safetensors", model, resume_step=7)


def test_an_earlier_file_is_not_overwritten(model: MixtralForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    RouterNormTracker(path, model)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="routers.safetensors exists"):
        RouterNormTracker(path, model)
    assert path.read_bytes() == before


def test_trainer_drives_the_tracker(model: MixtralForCausalLM, tmp_path: Path) -> None:
    path, initial = tmp_path / "routers.safetensors", _routers(model)

    _trainer(model, tmp_path, max_steps=3).train()

    _assert_initial(path, initial)
    written = load_file(path)
    assert written["norm_history.steps"].tolist() == [0, 2, 3]
    for name, final in _routers(model).items():
        assert not torch.equal(final, initial[name])
        torch.testing.assert_close(written[f"{name}.norm_history"][-1], final.norm(dim=1))


def test_base_router_reads_what_the_tracker_wrote(
    model: MixtralForCausalLM, tmp_path: Path
) -> None:
    path, initial = tmp_path / "routers.safetensors", _routers(model)
    tracker = RouterNormTracker(path, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(3):
        _train_step(model, optimizer)
        tracker.step()
    tracker.save()
    model.save_pretrained(tmp_path / "trained")
    source = SourceModel.open(tmp_path / "trained")
    layers = source.layers
    base = load_base_routers(str(path), layers)
    final = _routers(model)
    for layer, name in zip(layers, initial, strict=True):
        change = final[name].double().norm(dim=1) - initial[name].double().norm(dim=1)
        assert change.abs().max() > 1e-4
        values = router_norms(source, layer, base).values
        torch.testing.assert_close(values.double(), change, atol=1e-6, rtol=1e-4)


def test_a_model_without_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear has no router"):
        RouterNormTracker(tmp_path / "routers.safetensors", torch.nn.Linear(2, 2))


@pytest.mark.parametrize("every", [0, -1])
def test_every_must_be_positive(tmp_path: Path, every: int) -> None:
    with pytest.raises(ValueError, match=f"every={every}"):
        RouterNormTracker(tmp_path / "routers.safetensors", every=every)


@pytest.mark.parametrize("method", ["step", "save"])
def test_a_tracker_without_model_says_so(tmp_path: Path, method: str) -> None:
    with pytest.raises(ValueError, match="has no model yet"):
        getattr(RouterNormTracker(tmp_path / "routers.safetensors"), method)()
