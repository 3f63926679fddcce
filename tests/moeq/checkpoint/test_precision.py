"""Sources in lower precision are read, and packed, as their dequantized twins."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import moeq
from moeq.checkpoint import SourceModel
from moeq.checkpoint.precision import source_format
from moeq.checkpoint.verify import verify_checkpoint
from moeq.errors import MoeqError
from support.models import load_model, save_tokenizer
from support.packed import write_packed
from support.sources import (
    FUSED,
    LOWERED,
    Tensors,
    compressed,
    fused_and_twin,
    load,
    lowered_and_twin,
    mxfp4,
    mxfp4_and_twin,
    mxfp4_matrix,
    rewrite,
)
from vllm_moeq.format import BitPlan, LayerBits

TinyModel = Callable[[str], Path]
every_kind = pytest.mark.parametrize("kind", LOWERED)


RELEASED = {
    "deepseek_v32": "fp8 blocks",
    "deepseek_v4": "mxfp4 matrices",
    "ernie4_5_moe": "int4",
    "glm4_moe": "fp8 channel",
    "glm4_moe_lite": "int4",
    "glm_moe_dsa": "fp8 blocks, powers of two",
    "kimi_k2": "int4",
    "mimo_v2_flash": "fp8 blocks",
    "minimax_m2": "fp8 blocks",
    "mixtral": "fp8 tensor",
    "nemotron_h": "fp8 tensor",
    "phimoe": "int4 zero points",
    "qwen3_5_moe": "fp8 blocks",
    "qwen3_next": "fp8 blocks",
}
"""Some families with a precision each; two more have all kinds. Fused ones are tested below."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("deepseek_v3", "qwen3_moe") for kind in LOWERED]
    + list(RELEASED.items()),
)
def test_a_source_reads_as_its_twin(
    tiny_model: TinyModel, tmp_path: Path, name: str, kind: str
) -> None:
    lowered, twin = lowered_and_twin(tiny_model(name), tmp_path, kind)
    reader, expected = SourceModel.open(lowered).reader, load(twin)
    assert set(reader.tensors) == set(expected)
    for tensor_name, tensor in expected.items():
        assert reader.info(tensor_name).num_bytes == tensor.nbytes
        assert torch.equal(reader.tensor(tensor_name), tensor), tensor_name


def _mixed_plan(source: Path) -> BitPlan:
    bits = LayerBits((3, 2, 1, 4, 8, 2, 2, 3), (2, 4, 8, 1, 2, 3, 3, 4))
    return BitPlan(32, {layer.container: bits for layer in SourceModel.open(source).layers})


@pytest.fixture(scope="module")
def fused(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE in bfloat16 with the experts of a layer in one tensor."""
    folder = tmp_path_factory.mktemp("fused") / "model"
    model = load_model(tiny_model("qwen3_moe"), torch.bfloat16)
    model.save_pretrained(folder, save_original_format=False)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "transposed"),
    [(kind, False) for kind in FUSED] + [(kind, True) for kind in FUSED if kind != "mxfp4"],
)
def test_fused_experts_read_as_their_twins(
    fused: Path, tmp_path: Path, kind: str, transposed: bool
) -> None:
    _assert_reads_alike(*fused_and_twin(fused, tmp_path, kind, transposed))


def test_fused_experts_of_a_vision_model_read_as_their_twins(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    _assert_reads_alike(*fused_and_twin(tiny_model("qwen3_vl_moe"), tmp_path, "blocks", True))


def _assert_reads_alike(lowered: Path, twin: Path) -> None:
    reader, expected = SourceModel.open(lowered).reader, SourceModel.open(twin).reader
    assert any(tensor.element_size() == 1 for tensor in load(lowered).values())
    assert set(reader.tensors) == set(expected.tensors)
    for name, info in expected.tensors.items():
        assert reader.info(name).num_bytes == info.num_bytes
        assert torch.equal(reader.tensor(name), expected.tensor(name)), name


@every_kind
def test_it_is_packed_to_the_same_bytes(tiny_model: TinyModel, tmp_path: Path, kind: str) -> None:
    folders = lowered_and_twin(tiny_model("deepseek_v3"), tmp_path, kind)
    plan = _mixed_plan(folders[0])
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
    plan = _mixed_plan(folders[0])
    packed = [write_packed(f, tmp_path / f"packed{n}", plan) for n, f in enumerate(folders)]
    assert verify_checkpoint(packed[0]) == []
    (first,), (second,) = (list(folder.glob("*.safetensors")) for folder in packed)
    assert first.read_bytes() == second.read_bytes()


def test_transformers_dequantizes_mxfp4_to_the_same_weights() -> None:
    weights = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    stored, twin = mxfp4(weights)
    dequantized = convert_moe_packed_tensors(stored["blocks"], stored["scales"])
    assert torch.equal(dequantized.mT, twin)  # it returns [experts, inputs, outputs]
    tensors, twin = mxfp4_matrix(weights)
    assert torch.equal(Fp8Dequantize(None)._dequantize_one(*tensors.values()), twin)


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("deepseek_v3", "fp8 blocks"),
        ("qwen3_moe", "int4 zero points"),
        ("qwen3_moe", "fused"),
        ("gpt_oss", "mxfp4"),
    ],
)
def test_calibration_and_evaluation_cannot_tell_them_apart(
    tiny_model: TinyModel, fused: Path, tmp_path: Path, name: str, kind: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Experts learn what their router sends them. " * 200)
    if kind == "fused":
        both = fused_and_twin(fused, tmp_path, "blocks")
    elif kind == "mxfp4":
        both = mxfp4_and_twin(tiny_model(name), tmp_path)
    else:
        both = lowered_and_twin(tiny_model(name), tmp_path, kind)
    plan = _mixed_plan(both[0])
    results = []
    for folder in both:
        output = tmp_path / f"{folder.name}-packed"
        moeq.quantize(folder, output, plan=plan, method="gptq", calib=text, nsamples=4, seqlen=64)
        assert moeq.verify(output) == []
        (file,) = output.glob("*.safetensors")
        found = [
            moeq.evaluate(output, against=folder, text=text, backend=backend, nsamples=4, seqlen=64)
            for backend in ("reference", "transformers")
        ]
        results.append((file.read_bytes(), found))
    assert results[0] == results[1]
    ours, transformers = results[0][1]
    assert ours.total.divergence == pytest.approx(transformers.total.divergence, rel=1e-3)


@pytest.mark.parametrize("stored_as", ["F4", "U8"])
def test_bytes_say_the_same_under_other_types(
    tiny_model: TinyModel, tmp_path: Path, stored_as: str
) -> None:
    """As FP4 of safetensors' own, and exponents that are plain bytes."""
    lowered, twin = lowered_and_twin(tiny_model("qwen3_moe"), tmp_path, "mxfp4 matrices")
    dtype = {"F4": torch.float4_e2m1fn_x2, "U8": torch.uint8}[stored_as]
    tensors = {
        name: tensor.view(torch.uint8 if name.endswith(".scale") else dtype)
        if name.endswith((".scale", "_proj.weight"))
        else tensor
        for name, tensor in load(lowered).items()
    }
    reader = SourceModel.open(rewrite(lowered, tmp_path / "changed", tensors)).reader
    assert reader.stored(GATE + "weight", reader.info(GATE + "weight").file).dtype == dtype
    expected = load(twin)
    assert set(reader.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(reader.tensor(name), tensor), name


def test_exponents_in_plain_bytes_scale_fp8(tiny_model: TinyModel, tmp_path: Path) -> None:
    kind = "fp8 blocks, powers of two"
    lowered, twin = lowered_and_twin(tiny_model("qwen3_moe"), tmp_path, kind)
    scales = {n: t.view(torch.uint8) for n, t in load(lowered).items() if n.endswith(".scale")}
    changed = rewrite(lowered, tmp_path / "changed", load(lowered) | scales)
    reader = SourceModel.open(changed).reader
    for name, tensor in load(twin).items():
        assert torch.equal(reader.tensor(name), tensor), name


def test_nothing_is_left_of_the_source_s_precision(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Scales of a cache in FP8 go, and so does what a vision model says of its language model."""
    source = tiny_model("qwen3_vl_moe")
    lowered, _ = fused_and_twin(source, tmp_path, "an expert", transposed=True)
    config = json.loads((lowered / "config.json").read_text())
    text = config["text_config"] | {"quantization_config": config.pop("quantization_config")}
    cache = {
        f"model.language_model.layers.0.self_attn.{name}": torch.tensor(0.5)
        for name in ("k_scale", "v_scale", "k_proj.output_scale")
    }
    changed = rewrite(lowered, tmp_path / "changed", load(lowered) | cache)
    (changed / "config.json").write_text(json.dumps(config | {"text_config": text}))
    packed = write_packed(changed, tmp_path / "packed", _mixed_plan(changed))
    assert verify_checkpoint(packed) == []
    written = json.loads((packed / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "moeq"
    assert "quantization_config" not in written["text_config"]
    scales = [name for name in load(packed) if "scale" in name]
    assert scales
    assert all(name.endswith("_proj.weight_scale") and ".experts." in name for name in scales)


GATE = "model.layers.1.mlp.experts.0.gate_proj."


def _remove(suffix: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(GATE + suffix)


def _set(suffix: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({GATE + suffix: tensor})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8 blocks", _remove("weight_scale_inv"), r"gate_proj\.weight is F8_E4M3 .*nothing to"),
        ("fp8 blocks", _set("scale", torch.ones(1, 1)), "weight_scale_inv and .*scale to say"),
        ("fp8 blocks", _set("weight_scale_inv", torch.ones(3, 1)), r"F32 \[3, 1\] does not fit"),
        ("fp8 blocks", _set("weight_scale_inv", torch.ones(1, 1).int()), r"I32 \[1, 1\] does not"),
        ("mxfp4 matrices", _set("scale", torch.ones(128, 4)), r"scale F32 \[128, 4\] is no MXFP4"),
        ("int4", _set("weight_shape", torch.tensor([128, 256])), "is no matrix of 128 x 256"),
        ("int4", _set("weight_shape", torch.tensor([8, 128, 128])), "columns of one matrix"),
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


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("kind", "scales", "message"),
    [
        ("blocks", torch.ones(8, 5, 4), r"\[8, 5, 4\] does not fit .* 64 x 32, of whole blocks"),
        ("blocks", torch.ones(7, 4, 4), r"\[7, 4, 4\] does not fit"),
        ("blocks", torch.ones(8, 2, 4), r"\[8, 2, 4\] does not fit"),
        ("an expert", torch.ones(8, 4, 4), r"one for each expert or row$"),
        ("mxfp4", torch.ones(8, 256, 4), r"F32 \[8, 256, 4\] is no MXFP4"),
    ],
)
def test_scales_that_do_not_fit_fused_experts_are_refused(
    fused: Path, tmp_path: Path, kind: str, scales: torch.Tensor, message: str
) -> None:
    lowered, _ = fused_and_twin(fused, tmp_path, kind)
    tensors = load(lowered) | {f"{GATE_UP}_scale_inv": scales}
    with pytest.raises(MoeqError, match=message):
        SourceModel.open(rewrite(lowered, tmp_path / "changed", tensors))


def test_blocks_that_may_start_anew_within_a_matrix_are_refused(
    fused: Path, tmp_path: Path
) -> None:
    """Blocks of 192 leave open whether up, which starts at row 128, is in the first."""
    lowered, _ = fused_and_twin(fused, tmp_path, "blocks")
    quantization = {"quant_method": "fp8", "weight_block_size": [192, 32]}
    tensors = load(lowered) | {f"{GATE_UP}_scale_inv": torch.ones(8, 2, 4)}
    changed = rewrite(lowered, tmp_path / "changed", tensors, quantization_config=quantization)
    with pytest.raises(MoeqError, match="does not fit .*, of whole blocks"):
        SourceModel.open(changed)


@pytest.mark.parametrize("kind", ["fp8 blocks", "fp8 blocks, powers of two"])
def test_a_source_that_does_not_say_how_it_is_quantized_is_refused(
    tiny_model: TinyModel, tmp_path: Path, kind: str
) -> None:
    lowered, _ = lowered_and_twin(tiny_model("qwen3_moe"), tmp_path, kind)
    changed = rewrite(lowered, tmp_path / "changed", load(lowered), quantization_config=None)
    with pytest.raises(MoeqError, match="is F8_E.*config.json does not explain. Start from"):
        SourceModel.open(changed)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "quark"},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "moeq"},
        compressed("nvfp4-pack-quantized", num_bits=4, type="float"),
        compressed("int-quantized", num_bits=8, type="int"),
        compressed("pack-quantized", num_bits=2, type="int"),
    ],
    ids=lambda quantization: quantization.get("format") or quantization["quant_method"],
)
def test_other_precisions_are_refused_by_name(quantization: dict[str, Any]) -> None:
    name = quantization.get("format") or quantization["quant_method"]
    with pytest.raises(MoeqError, match=f"models/it is quantized .*{name}.* Start from the model"):
        source_format({"quantization_config": quantization}, "models/it")
