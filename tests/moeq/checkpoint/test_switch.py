"""Switch Transformers: names as Google's checkpoints have them, and what is refused."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeq import RouterNormTracker, plan, quantize, verify
from moeq.checkpoint import Matrix, SourceModel
from moeq.errors import MoeqError
from moeq.model.structure import check_structure
from moeq.signals import load_base_routers, router_norms
from support.models import load_model
from support.sources import Tensors, load, rewrite
from vllm_moeq.format import write_manifest

TinyModel = Callable[[str], Path]
TINY = "switch_transformers"
ENCODER, DECODER = "encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"
CONTAINERS = [
    f"{ENCODER}.experts", "encoder.block.3.layer.1.mlp.experts", f"{DECODER}.experts"
]  # fmt: skip
SWITCH_BASE_8 = {
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "model_type": TINY,
    "is_encoder_decoder": True,
    "d_ff": 3072,
    "d_kv": 64,
    "d_model": 768,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_sparse_encoder_layers": 6,
    "num_sparse_decoder_layers": 6,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 8,
    "expert_capacity": 64,
    "dense_act_fn": "relu",
    "feed_forward_proj": "relu",
    "is_gated_act": False,
    "router_type": "tokens_masked",
    "router_dtype": "float32",
    "vocab_size": 32128,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def _google_names() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes in google/switch-base-8, embeddings stored four times."""
    for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        yield f"{name}.weight", (32128, 768)
    for stack in ("encoder", "decoder"):
        yield f"{stack}.final_layer_norm.weight", (768,)
        parts = ["SelfAttention", *(["EncDecAttention"] if stack == "decoder" else [])]
        for block in range(12):
            for number, attention in enumerate(parts):
                layer = f"{stack}.block.{block}.layer.{number}"
                yield f"{layer}.layer_norm.weight", (768,)
                for matrix in "qkvo":
                    yield f"{layer}.{attention}.{matrix}.weight", (768, 768)
                if block == number == 0:
                    yield f"{layer}.{attention}.relative_attention_bias.weight", (32, 12)
            layer = f"{stack}.block.{block}.layer.{len(parts)}"
            yield f"{layer}.layer_norm.weight", (768,)
            if block % 2 == 0:
                yield f"{layer}.mlp.wi.weight", (3072, 768)
                yield f"{layer}.mlp.wo.weight", (768, 3072)
                continue
            yield f"{layer}.mlp.router.classifier.weight", (8, 768)
            for expert in range(8):
                yield f"{layer}.mlp.experts.expert_{expert}.wi.weight", (3072, 768)
                yield f"{layer}.mlp.experts.expert_{expert}.wo.weight", (768, 3072)


def _write_zeros(folder: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of float32 zeros that takes no space on the disk."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def google(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SWITCH_BASE_8))
    _write_zeros(tmp_path, dict(_google_names()))
    return tmp_path


def test_switch_base_8_is_read_by_its_own_names(google: Path) -> None:
    source = SourceModel.open(google)
    check_structure(source.reader, source.layers)

    assert [(layer.index, layer.container) for layer in source.layers] == [
        *((i, f"encoder.block.{i}.layer.1.mlp.experts") for i in range(1, 12, 2)),
        *((12 + i, f"decoder.block.{i}.layer.2.mlp.experts") for i in range(1, 12, 2)),
    ]
    for layer in source.layers:
        assert (layer.num_experts, layer.hidden_size, layer.intermediate_size) == (8, 768, 3072)
        assert layer.router == layer.container.removesuffix("experts") + "router.classifier.weight"
    decided = plan(google, bits=2.125, calib="none", strategy="random:0")
    assert decided.provenance.total_bytes and decided.group_size == 128


def test_every_expert_is_that_of_the_model_in_memory(tiny_model: TinyModel) -> None:
    folder = tiny_model(TINY)
    source, model = SourceModel.open(folder), load_model(folder, torch.bfloat16)
    assert [layer.container for layer in source.layers] == CONTAINERS
    for layer in source.layers:
        block: Any = model.get_submodule(layer.container.removesuffix(".experts"))
        assert torch.equal(source.tensor(layer.router), block.router.classifier.weight)
        for expert in range(layer.num_experts):
            dense = block.experts[f"expert_{expert}"]
            matrices: dict[Matrix, Any] = {"up": dense.wi.weight, "down": dense.wo.weight}
            for matrix, weight in matrices.items():
                assert torch.equal(source.tensor(layer.tensor_name(expert, matrix)), weight)


def _without(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def _nothing(tensors: Tensors) -> None:
    """Change only the config."""


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            _without(f"{DECODER}.experts.expert_3.wi.weight"),
            {},
            f"{DECODER}.experts.3.wi.weight is missing",
        ),
        (
            _without(f"{ENCODER}.router.classifier.weight"),
            {},
            f"{ENCODER}.router.classifier.weight is missing",
        ),
        (_without("shared.weight"), {}, r"tensor shared.weight \[320, 128\] is missing\. "),
        (_without("decoder.final_layer_norm.weight"), {}, "decoder.final_layer_norm.weight"),
        (_nothing, {"tie_word_embeddings": False}, "embed_tokens.weight .* is missing"),
        (_nothing, {"num_experts": 9}, f"{CONTAINERS[0]} holds 8 experts .* says 9 of"),
        (_nothing, {"num_sparse_decoder_layers": 0, "decoder_sparse_step": 0}, "gives the layer"),
        (_nothing, {"num_layers": 3}, "encoder.block.3.* is of no layer .* num_layers 3"),
        (_nothing, {"num_layers": None}, "config.json has num_layers None"),
        (_nothing, {"dense_act_fn": "gelu_new"}, "dense_act_fn 'gelu_new'.* with relu only"),
        (
            lambda tensors: tensors.update({"lm_head.weight": tensors["shared.weight"] + 1}),
            {},
            "tensor lm_head.weight differs from shared.weight",
        ),
    ],
)
def test_what_is_not_the_model_of_its_config_is_refused(
    change: Callable[[Tensors], None],
    config: dict[str, Any],
    message: str,
    tiny_model: TinyModel,
    tmp_path: Path,
) -> None:
    source = tiny_model(TINY)
    tensors = load(source)
    change(tensors)
    folder = rewrite(source, tmp_path / "changed", tensors, **config)
    with pytest.raises(MoeqError, match=message):
        quantize(folder, tmp_path / "out", bits=2.5, calib="none", method="rtn")
    assert not (tmp_path / "out").exists()


def test_weights_in_bin_files_are_refused_with_advice(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    config = (tiny_model(TINY) / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MoeqError, match=r"has neither .* in \.bin files: .* `save_pretrained`"):
        SourceModel.open(tmp_path)


def test_norms_change_against_the_routers_that_a_tracker_saw(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model(TINY)
    before = load_model(folder)
    RouterNormTracker(tmp_path / "routers.safetensors", before)
    names = [f"{name.removesuffix('experts')}router.classifier.weight" for name in CONTAINERS]
    recorded = load_file(tmp_path / "routers.safetensors")
    assert {name for name in recorded if name.endswith("weight")} == set(names)
    tensors = load(folder)
    for number, name in enumerate(names, 2):
        tensors[name] = tensors[name] * number
    trained = SourceModel.open(rewrite(folder, tmp_path / "trained", tensors))

    # What the tracker wrote says the same as the pretrained checkpoint.
    for start in (folder, tmp_path / "routers.safetensors"):
        base = load_base_routers(str(start), trained.layers)
        for layer, name in zip(trained.layers, names, strict=True):
            found = router_norms(trained, layer, base)
            initial = load(folder)[name].double().norm(dim=1)
            expected = tensors[name].double().norm(dim=1) - initial
            assert not found.surrogate
            torch.testing.assert_close(found.values.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_packed_checkpoint_that_lacks_a_tensor_is_told(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantize(tiny_model(TINY), tmp_path / "out", bits=2.5, calib="none", method="rtn")
    assert "vLLM has no switch_transformers: the result runs in transformers" in caplog.text
    assert not model.in_vllm
    card = (model.path / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card and "vllm serve" not in card

    (file,) = model.path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["decoder.block.0.layer.1.EncDecAttention.k.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    index = model.path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"]["decoder.block.0.layer.1.EncDecAttention.k.weight"]
    index.write_text(json.dumps(listed))
    write_manifest(model.path)
    (problem,) = verify(model.path)
    assert "decoder.block.0.layer.1.EncDecAttention.k.weight [128, 128] is missing" in problem


def test_dense_layers_stay_in_16_bits(tiny_model: TinyModel) -> None:
    with pytest.raises(MoeqError, match="`dense_bits` 8: dense layers of switch_transformers stay"):
        plan(tiny_model(TINY), bits=2.5, calib="none", dense_bits=8)
