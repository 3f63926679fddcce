"""Dense layers that a source stores as integers are copied where the format can hold them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

import moeq
from moeq.errors import MoeqError
from support.packed import write_packed
from support.sources import load, lowered_and_twin, rewrite
from vllm_moeq.format import BitPlan

TinyModel = Callable[[str], Path]
FAMILY = "glm4_moe"  # its first layer has a dense MLP, its second a shared expert
DENSE = 2 * (4 + 3)
DATA_FREE: dict[str, Any] = {"bits": 2, "calib": None, "group_size": 32}


def _quantized(source: Path, folder: Path, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the tensors of the result, and its ``quantization_config``."""
    moeq.quantize(source, folder, **DATA_FREE | options)
    assert moeq.verify(folder) == []
    return load(folder), json.loads((folder / "config.json").read_text())["quantization_config"]


def _targets(config: Any) -> dict[str, int]:
    """Return the widths that compressed-tensors would read, by layer."""
    groups = (config["linear"] or {"config_groups": {}})["config_groups"].values()
    return {name: group["weights"]["num_bits"] for group in groups for name in group["targets"]}


def _weight(tensors: dict[str, torch.Tensor], layer: str, bits: int) -> torch.Tensor:
    """Read a layer as compressed-tensors does, in float64."""
    shape = tensors[f"{layer}.weight_shape"].tolist()
    scale = tensors[f"{layer}.weight_scale"].double()
    codes = unpack_from_int32(tensors[f"{layer}.weight_packed"], bits, shape).double()
    return codes * scale.repeat_interleave(shape[1] // scale.shape[1], 1)


def _text(folder: Path, words: str) -> Path:
    path = folder / f"{words.split()[0]}.txt"
    path.write_text(words * 400)
    return path


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (4, 64)])
def test_they_are_the_same_integers(
    tiny_model: TinyModel, tmp_path: Path, bits: int, group: int
) -> None:
    kind = f"int{bits} in groups of {group}"
    lowered, _ = lowered_and_twin(tiny_model(FAMILY), tmp_path, kind)
    result, config = _quantized(lowered, tmp_path / "packed")
    source, targets = load(lowered), _targets(config)
    assert len(targets) == DENSE
    for layer in targets:
        assert targets[layer] == bits
        assert f"{layer}.weight" not in result
        assert torch.equal(result[f"{layer}.weight_packed"], source[f"{layer}.weight_packed"])
        assert torch.equal(_weight(result, layer, bits), _weight(source, layer, bits))
        assert result[f"{layer}.weight_scale"].shape[1] * 32 == result[f"{layer}.weight_shape"][1]
    note = config["provenance"]["details"]["source_precision"]
    assert f"{bits} bits" in note
    assert f"bfloat16, but for {DENSE} dense layers, which are copied" in note
    assert note in (tmp_path / "packed" / "README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("int4 zero points", {}),
        ("int4 in groups of 32", {"group_size": 64}),
        ("int4 in groups of 32", {"dense_bits": 16}),
        ("fp8 channel", {}),
        ("mxfp4 matrices", {}),
    ],
)
def test_else_they_are_written_in_16_bits(
    tiny_model: TinyModel, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    lowered, twin = lowered_and_twin(tiny_model(FAMILY), tmp_path, kind)
    result, config = _quantized(lowered, tmp_path / "packed", **options)
    assert config["linear"] is None
    assert config["provenance"]["details"]["source_precision"].endswith("dequantized to bfloat16")
    for name, tensor in load(twin).items():
        if ".mlp.experts." not in name:
            assert torch.equal(result[name], tensor)


def test_scales_that_kernels_would_round_are_not_copied(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    lowered, _ = lowered_and_twin(tiny_model(FAMILY), tmp_path, "int4 in groups of 32")
    tensors = load(lowered)
    tensors["model.layers.0.self_attn.k_proj.weight_scale"][0, 0] = 2.0**-30
    changed = rewrite(lowered, tmp_path / "changed", tensors)
    _, config = _quantized(changed, tmp_path / "packed")
    attention = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    everywhere = {name.replace("layers.0", "layers.1") for name in attention}
    assert not attention & _targets(config).keys()
    assert everywhere <= _targets(config).keys()


@pytest.mark.parametrize("dense_bits", [4, 8])
def test_a_width_does_what_it_says(tiny_model: TinyModel, tmp_path: Path, dense_bits: int) -> None:
    lowered, twin = lowered_and_twin(tiny_model(FAMILY), tmp_path, "int8 in groups of 32")
    result, config = _quantized(lowered, tmp_path / "packed", dense_bits=dense_bits)
    source, weights = load(lowered), load(twin)
    assert set(_targets(config).values()) == {dense_bits}
    for layer in _targets(config):
        same = torch.equal(result[f"{layer}.weight_packed"], source[f"{layer}.weight_packed"])
        assert same == (dense_bits == 8)
        error = _weight(result, layer, dense_bits) - weights[f"{layer}.weight"].double()
        assert error.norm() < 0.15 * weights[f"{layer}.weight"].double().norm()


def test_a_plan_does_what_it_says(tiny_model: TinyModel, tmp_path: Path) -> None:
    lowered, _ = lowered_and_twin(tiny_model(FAMILY), tmp_path, "int4 in groups of 32")
    plan = moeq.plan(lowered, **DATA_FREE)
    assert set(plan.linear_bits.values()) == {4}
    kept = {name: bits for name, bits in plan.linear_bits.items() if "self_attn" in name}
    part = BitPlan(32, plan.expert_bits, linear_bits=kept)
    packed = write_packed(lowered, tmp_path / "packed", part)
    result, source = load(packed), load(lowered)
    (up,) = (name for name in result if "shared_experts.up_proj" in name)
    assert up.endswith(".weight")
    for layer in kept:
        assert torch.equal(result[f"{layer}.weight_packed"], source[f"{layer}.weight_packed"])
    one = dict([next(iter(kept.items()))])
    with pytest.raises(MoeqError, match="are one layer in vLLM and need one width"):
        moeq.quantize(
            lowered, tmp_path / "out", plan=BitPlan(32, plan.expert_bits, linear_bits=one),
            calib=None,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "size"), [(4, 420_000), (8, 600_000)])
def test_measured_plans_count_them_as_they_are(
    tiny_model: TinyModel, tmp_path: Path, bits: int, size: int
) -> None:
    lowered, _ = lowered_and_twin(tiny_model(FAMILY), tmp_path, f"int{bits} in groups of 32")
    text = _text(tmp_path, "experts route tokens ")
    result = moeq.quantize(
        lowered, tmp_path / "packed", target_size=size, group_size=32, calib=text, nsamples=8,
        seqlen=32,
    )  # fmt: skip
    tensors, source = load(result.path), load(lowered)
    assert moeq.verify(result.path) == []
    assert size * 0.9 < sum(tensor.nbytes for tensor in tensors.values()) <= size
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]
    targets = _targets(config)
    assert len(targets) == DENSE
    assert set(targets.values()) <= {4, bits}
    copied = [layer for layer, width in targets.items() if width == bits]
    assert copied
    for layer in copied:
        assert torch.equal(tensors[f"{layer}.weight_packed"], source[f"{layer}.weight_packed"])


@pytest.mark.slow
def test_measured_plans_report_those_they_had_to_choose_for(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    lowered, _ = lowered_and_twin(tiny_model(FAMILY), tmp_path, "int4 in groups of 32")
    text = _text(tmp_path, "experts route tokens ")
    result = moeq.quantize(
        lowered, tmp_path / "packed", group_size=32, calib=text, nsamples=8, seqlen=32,
        strategy="sensitivity", method="rtn", quantize_embeddings=True,
    )  # fmt: skip
    report = json.loads((result.path / "moeq_measurement.json").read_text())
    assert set(report["dense"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert set(_targets(config)) >= {"model.layers.0.self_attn.o_proj"}
    assert moeq.verify(result.path) == []


def test_plans_that_are_compared_have_the_same_dense_layers(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    lowered, _ = lowered_and_twin(tiny_model(FAMILY), tmp_path, "int4 in groups of 32")
    text = _text(tmp_path, "experts route tokens ")
    heldout = _text(tmp_path, "tokens choose experts ")
    findings = moeq.compare(
        lowered, tmp_path / "page", bits=[2.5], methods=["rtn"], random=2, calib=text,
        text=heldout, nsamples=4, seqlen=16, eval_nsamples=2, group_size=32,
    )  # fmt: skip
    sizes = [point.total_bytes for point in findings.points]
    assert max(sizes) - min(sizes) < 0.02 * max(sizes)
