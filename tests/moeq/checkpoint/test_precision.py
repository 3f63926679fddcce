"""Sources in lower precision are read, and packed, as their dequantized twins."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moeq.checkpoint import SourceModel
from moeq.checkpoint.verify import verify_checkpoint
from moeq.errors import MoeqError
from support.cli import run_moeq
from support.packed import write_packed
from support.sources import LOWERED, Tensors, load, lowered_and_twin, mxfp4, mxfp4_and_twin, rewrite
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


def test_mxfp4_is_packed_to_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    folders = mxfp4_and_twin(tiny_model("gpt_oss"), tmp_path)
    readers = [SourceModel.open(folder).reader for folder in folders]
    assert readers[0].tensors.keys() == readers[1].tensors.keys()
    for name, info in readers[1].tensors.items():
        assert readers[0].info(name).shape == info.shape
        assert torch.equal(readers[0].tensor(name), readers[1].tensor(name)), name
    bits = LayerBits((3, 2, 1, 4, 8, 2, 2, 3), (2, 4, 8, 1, 2, 3, 3, 4))
    plan = BitPlan(32, {layer.container: bits for layer in SourceModel.open(folders[0]).layers})
    packed = [write_packed(f, tmp_path / f"packed{n}", plan) for n, f in enumerate(folders)]
    assert verify_checkpoint(packed[0]) == []
    (first,), (second,) = (list(folder.glob("*.safetensors")) for folder in packed)
    assert first.read_bytes() == second.read_bytes()


def test_transformers_dequantizes_mxfp4_to_the_same_weights() -> None:
    stored, twin = mxfp4(torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)))
    dequantized = convert_moe_packed_tensors(stored["blocks"], stored["scales"])
    assert torch.equal(dequantized.mT, twin)  # it returns [experts, inputs, outputs]


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("scales", None, "gate_up_proj_scales is missing"),
        ("scales", torch.zeros(8, 384, 3, dtype=torch.uint8), "is no MXFP4: expected U8, 16 bytes"),
        ("blocks", torch.zeros(8, 384, 4, 16), "F32 .* is no MXFP4"),
    ],
)
def test_incomplete_mxfp4_is_refused(
    tiny_model: TinyModel, tmp_path: Path, suffix: str, tensor: torch.Tensor | None, message: str
) -> None:
    lowered, _ = mxfp4_and_twin(tiny_model("gpt_oss"), tmp_path)
    tensors = load(lowered)
    name = f"model.layers.0.mlp.experts.gate_up_proj_{suffix}"
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(MoeqError, match=message):
        SourceModel.open(rewrite(lowered, tmp_path / "changed", tensors))


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
