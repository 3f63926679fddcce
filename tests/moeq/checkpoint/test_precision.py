"""Sources in lower precision are read, and packed, as their dequantized twins."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeq.checkpoint import SourceModel
from moeq.errors import MoeqError
from support.cli import run_moeq
from support.packed import write_packed
from support.sources import LOWERED, Tensors, load, lowered_and_twin, rewrite
from vllm_moeq.format import BitPlan, LayerBits

TinyModel = Callable[[str], Path]
every_kind = pytest.mark.parametrize("kind", LOWERED)


@every_kind
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
def test_a_source_reads_as_its_twin(
    tiny_model: TinyModel, tmp_path: Path, name: str, kind: str
) -> None:
    lowered, twin = lowered_and_twin(tiny_model(name), tmp_path, kind)
    reader, expected = SourceModel.open(lowered).reader, load(twin)
    assert set(reader.tensors) == set(expected)
    for tensor_name, tensor in expected.items():
        assert reader.info(tensor_name).num_bytes == tensor.nbytes
        assert torch.equal(reader.tensor(tensor_name), tensor), tensor_name


@every_kind
def test_it_is_packed_to_the_same_bytes(tiny_model: TinyModel, tmp_path: Path, kind: str) -> None:
    folders = lowered_and_twin(tiny_model("deepseek_v3"), tmp_path, kind)
    bits = LayerBits((3, 2, 1, 4, 8, 2, 2, 3), (2, 4, 8, 1, 2, 3, 3, 4))
    plan = BitPlan(32, {layer.container: bits for layer in SourceModel.open(folders[0]).layers})
    packed = [write_packed(f, tmp_path / f"packed{n}", plan) for n, f in enumerate(folders)]
    (first,), (second,) = (list(folder.glob("*.safetensors")) for folder in packed)
    assert first.read_bytes() == second.read_bytes()
    config = json.loads((packed[0] / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "moeq"
    assert "bfloat16" in config["provenance"]["details"]["source_precision"]


def test_calibrated_rounding_gives_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Experts learn what their router sends them. " * 200)
    files = []
    for folder in lowered_and_twin(tiny_model("deepseek_v3"), tmp_path, "fp8 blocks"):
        output = tmp_path / f"{folder.name}-packed"
        options = "--bits", 2.5, "--group-size", 32, "--nsamples", 4, "--seqlen", 64
        done = run_moeq("quantize", folder, "-o", output, *options, "--calib", text)
        assert done.returncode == 0, done.stderr
        verified = run_moeq("verify", output)
        assert verified.returncode == 0, verified.stderr
        (file,) = output.glob("*.safetensors")
        files.append(file.read_bytes())
    assert files[0] == files[1]


GATE = "model.layers.1.mlp.experts.0.gate_proj."


def _remove(suffix: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(GATE + suffix)


def _set(suffix: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({GATE + suffix: tensor})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8 blocks", _remove("weight_scale_inv"), r"gate_proj\.weight is F8_E4M3 .*no .*_inv or"),
        ("fp8 blocks", _set("weight_scale_inv", torch.ones(3, 1)), r"_inv \[3, 1\] does not fit"),
        ("int4", _set("weight_shape", torch.tensor([128, 256])), "is no matrix of 128 x 256"),
        ("int4", _remove("weight_scale"), "gate_proj.weight_scale is missing"),
        ("int4", _remove("weight_shape"), "gate_proj.weight_shape is missing"),
        ("int4", _set("weight_g_idx", torch.zeros(128)), "weight_g_idx reorders columns"),
    ],
)
def test_incomplete_sources_are_refused(
    tiny_model: TinyModel,
    tmp_path: Path,
    kind: str,
    change: Callable[[Tensors], object],
    message: str,
) -> None:
    lowered, _ = lowered_and_twin(tiny_model("qwen3_moe"), tmp_path, kind)
    tensors = load(lowered)
    change(tensors)
    with pytest.raises(MoeqError, match=message):
        SourceModel.open(rewrite(lowered, tmp_path / "changed", tensors))
