"""Checkpoints with more or less than the model: converted soundly, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.cli import run_moeq
from support.models import add_prediction_layer
from vllm_moeq.format import write_manifest

TinyModel = Callable[[str], Path]
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


def _read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def _changed(
    model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any
) -> Path:
    """Return a copy of a model with other tensors and keys of its config."""
    tensors = _read(model)
    change(tensors)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 200)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["model.layers.2.", "mtp.layers.0."])
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_layers_that_predict_more_tokens_stay_as_they_are(
    tiny_model: TinyModel, tmp_path: Path, text: Path, prefix: str, calibrated: bool
) -> None:
    plain = tiny_model("deepseek_v3")
    model = add_prediction_layer(plain, tmp_path / "model", prefix)
    options: tuple[object, ...] = ("--bits", 2, "--group-size", 32, "--calib", "none")
    if calibrated:
        options = ("--bits", 2, "--group-size", 32, "--strategy", "uniform", "--method", "gptq",
                   "--calib", text, "--nsamples", 4, "--seqlen", 32)  # fmt: skip
    packed = {}
    for source, out in ((plain, "without"), (model, "with")):
        done = run_moeq("quantize", source, "-o", tmp_path / out, *options)
        assert done.returncode == 0, done.stderr
        packed[out] = _read(tmp_path / out)
    done = run_moeq("verify", tmp_path / "with")
    assert done.returncode == 0, done.stdout + done.stderr

    original = _read(model)
    more = {name: packed["with"].pop(name) for name in original if name.startswith(prefix)}
    assert any(".experts." in name for name in more)
    assert all(torch.equal(tensor, original[name]) for name, tensor in more.items())
    assert packed["with"].keys() == packed["without"].keys()
    assert all(
        torch.equal(packed["with"][name], packed["without"][name]) for name in packed["with"]
    )


def test_layer_with_fewer_experts_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    def prune(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.startswith("model.layers.1.") and (
                ".experts.6." in name or ".experts.7." in name
            ):
                del tensors[name]
        tensors[ROUTER] = tensors[ROUTER][:6].contiguous()

    model = _changed(tiny_model("mixtral"), tmp_path / "model", prune)

    done = run_moeq("quantize", model, "-o", tmp_path / "out", "--bits", 2, "--calib", "none")

    assert done.returncode == 1
    assert f"{ROUTER} has rows for 6 experts, config.json says 8" in done.stderr
    assert not (tmp_path / "out").exists()


def test_missing_head_is_refused(tiny_model: TinyModel, tmp_path: Path, text: Path) -> None:
    source = tiny_model("mixtral")
    model = _changed(source, tmp_path / "model", lambda tensors: tensors.pop("lm_head.weight"))
    message = "tensor lm_head.weight is missing"

    done = run_moeq("quantize", model, "-o", tmp_path / "out", "--bits", 2, "--calib", "none")
    assert done.returncode == 1
    assert message in done.stderr

    done = run_moeq("quantize", source, "-o", tmp_path / "out", "--bits", 2, "--calib", "none")
    assert done.returncode == 0, done.stderr
    lost = _changed(tmp_path / "out", tmp_path / "lost", lambda t: t.pop("lm_head.weight"))
    write_manifest(lost)  # the old one would speak first
    done = run_moeq("verify", lost)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    done = run_moeq("eval", lost, "--against", source, "--text", text)
    assert done.returncode == 1
    assert message in done.stderr


def test_tied_head_may_be_left_out(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = _changed(
        tiny_model("mixtral"),
        tmp_path / "model",
        lambda tensors: tensors.pop("lm_head.weight"),
        tie_word_embeddings=True,
    )
    done = run_moeq("quantize", model, "-o", tmp_path / "out", "--bits", 2, "--calib", "none")
    assert done.returncode == 0, done.stderr
