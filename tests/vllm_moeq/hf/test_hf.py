"""Packed checkpoints in transformers, against transformers on the dequantized ones."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from moeq.checkpoint import SourceModel
from support.checkpoints import change_tensors
from support.linear import MIXED, pack_linear
from support.models import KNOWN, load_model, make_config
from support.packed import W2_BITS, W13_BITS, write_packed
from support.reference import dequantize_checkpoint
from vllm_moeq.format import BitPlan, FormatError, LayerBits, check_manifest, guarded
from vllm_moeq.hf import MoeqConfig
from vllm_moeq.hf.experts import PackedExperts
from vllm_moeq.hf.linear import PackedLinear
from vllm_moeq.hf.packed import NoWeight

DIFFERENT = [
    "mixtral",  # w1, w2, w3; another name in memory
    "deepseek_v2",  # gate_proj, up_proj, down_proj; shared experts
    "granitemoe",  # fused in transformers
    "gpt_oss",  # biases, transposed, gate and up alternate
    "llama4_text",  # scales what its experts get
    "gemma4_text",  # another activation
    "nemotron_h",  # no gate
    "qwen3_vl_moe",  # inside a vision model
    "minimax_m3_vl",  # clamped, and 1 is added to up
]
TOKENS = torch.arange(3, 35).view(2, 16)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def packed(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that gives a family's packed checkpoint, all widths in each layer."""
    made: dict[tuple[str, bool], Path] = {}

    def get(family: str, dense: bool = True) -> Path:
        if (family, dense) not in made:
            model = tiny_model(family)
            bits = {
                layer.container: LayerBits(
                    tuple(W13_BITS[i:] + W13_BITS[:i]), tuple(W2_BITS[i:] + W2_BITS[:i])
                )
                for i, layer in enumerate(SourceModel.open(model).layers)
            }
            folder = tmp_path_factory.mktemp("hf") / "packed"
            # The last of two groups of gpt-oss's rows is half as long.
            group_size = 128 if family == "gpt_oss" else 32
            write_packed(model, folder, BitPlan(group_size, bits))
            if dense:
                # Gate and up of MiniMax-M3 are one layer in transformers, which is refused.
                joined = "(gate|up)_proj" if family == "minimax_m3_vl" else "none"
                pack_linear(folder, {name: w for name, w in MIXED.items() if joined not in name})
            made[family, dense] = folder
        return made[family, dense]

    return get


@pytest.fixture(scope="module")
def mixtral(packed: Callable[[str], Path]) -> Path:
    return packed("mixtral")


def _copy(folder: Path, target: Path) -> Path:
    """Copy a checkpoint, but not its manifest, which would notice every change first."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name != "moeq_manifest.json":
            (target / path.name).write_bytes(path.read_bytes())
    return target


def _tensors(folder: Path) -> Tensors:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(TOKENS).logits
    return logits


@pytest.mark.parametrize("family", KNOWN)
def test_equals_the_dequantized_model(
    packed: Callable[[str], Path],
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = packed(family)
    expected = _logits(load_model(dequantize_checkpoint(folder, tmp_path / "plain")))

    plain = load_model(folder, quantization_config=MoeqConfig(dequantize=True))
    assert torch.equal(_logits(plain), expected)
    assert not hasattr(plain.config, "quantization_config")

    if family in DIFFERENT:
        on_cpu = load_model(folder)
        kinds = {type(module) for module in on_cpu.modules()}
        assert {PackedExperts, PackedLinear} <= kinds
        # The kernel's own error: activations are 16-bit integers inside.
        torch.testing.assert_close(_logits(on_cpu), expected, atol=2e-3, rtol=0)

    monkeypatch.setenv("MOEQ_KERNEL", "reference")
    torch.testing.assert_close(_logits(load_model(folder)), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", KNOWN)
def test_transformers_alone_refuses(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This is all that the import changes in transformers.
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "moeq")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "moeq")
    make_config(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = guarded(config | {"quantization_config": {"quant_method": "moeq"}})
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match=r"import vllm_moeq\.hf"):
        load_model(tmp_path)
    # The others have no language model of their own in transformers.
    if family not in ("qwen3_vl_moe", "glm5_next", "minimax_m3_vl"):
        with pytest.raises(ValueError, match=r"import vllm_moeq\.hf"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_generates_what_the_dequantized_model_does(mixtral: Path) -> None:
    options = {"max_new_tokens": 12, "do_sample": False}
    mask = torch.ones_like(TOKENS)
    plain = load_model(mixtral, quantization_config=MoeqConfig(dequantize=True))
    expected = plain.generate(TOKENS, attention_mask=mask, **options)

    found = load_model(mixtral, device_map="auto").generate(TOKENS, attention_mask=mask, **options)

    assert torch.equal(found, expected)


def test_compiles_to_one_graph(mixtral: Path) -> None:
    # Where it breaks, torch.compile traces into the kernel, whose Python it cannot run.
    model = load_model(mixtral)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(_logits(compiled), _logits(model))


def test_memory_is_that_of_the_packed_tensors(mixtral: Path, tmp_path: Path) -> None:
    model = load_model(mixtral, dtype=torch.bfloat16)

    tensors = _tensors(mixtral)
    # The tiles of a dense layer have zero points too, a byte for each scale.
    tiles = [n for n in tensors if n.endswith("scale") and not re.search("experts|embed", n)]
    zeros = sum(tensors[name].numel() for name in tiles)
    stored = zeros + sum(t.nbytes for n, t in tensors.items() if not n.endswith("weight_shape"))
    # Rotary frequencies are in memory only.
    assert stored <= model.get_memory_footprint() < 1.001 * stored


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gpt_oss", "qwen3_vl_moe"])
def test_saved_again_it_is_the_same(
    packed: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    folder = packed(family)
    model = load_model(folder, dtype=torch.bfloat16)
    again = tmp_path / "again"
    model.save_pretrained(again, max_shard_size="400KB")

    stored, expected = _tensors(again), _tensors(folder)
    assert len(list(again.glob("*.safetensors"))) > 1
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor), name
    assert check_manifest(again) == []
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, again)]
    for key in ("quantization_config", "transformers_weights", "model_type", "dtype"):
        assert configs[0].get(key) == configs[1].get(key)
    assert torch.equal(_logits(load_model(again)), _logits(load_model(folder)))


def test_changed_dense_weights_are_saved(mixtral: Path, tmp_path: Path) -> None:
    model = copy.deepcopy(load_model(mixtral, dtype=torch.bfloat16))
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()
    model.save_pretrained(tmp_path / "again")

    before, after = _tensors(mixtral), _tensors(tmp_path / "again")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.block_sparse_moe.gate.weight"]


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gpt_oss"])
def test_dequantized_it_is_saved_as_a_plain_model(
    packed: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    folder = packed(family)
    plain = dequantize_checkpoint(folder, tmp_path / "plain")
    model = load_model(folder, quantization_config=MoeqConfig(dequantize=True))
    model.save_pretrained(tmp_path / "saved")

    stored, expected = _tensors(tmp_path / "saved"), _tensors(plain)
    # transformers itself has a shorter name for Granite's router than vLLM.
    short = {name.replace("router.layer.", "router."): tensor for name, tensor in expected.items()}
    assert {name.replace("router.layer.", "router.") for name in stored} == short.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, short[name.replace("router.layer.", "router.")])
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


DENSE = "model.layers.1.self_attn.k_proj"
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight_packed"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), "lacks 1 tensors, first w1.weight_packed of expert 3"),
        (lambda t: t.update({EXPERT: t[EXPERT][:, 1:].contiguous()}), r"expert.*3.*expected"),
        (lambda t: t.update({EXPERT.replace(".3.", ".8."): t[EXPERT].clone()}), "no place for"),
        (lambda t: t.pop(f"{DENSE}.weight_packed"), f"lacks {DENSE}.weight_packed. Check it"),
        (
            lambda t: t.update({f"{DENSE}.weight_scale": t[f"{DENSE}.weight_scale"].float() / 3}),
            rf"{DENSE}.weight_scale is torch.float32 \[64, 4\], expected torch.bfloat16 \[64, 4\]",
        ),
        (lambda t: t.pop(ROUTER), r"layers\.1\.mlp\.gate\.weight is missing"),
        (
            lambda t: t.update({ROUTER: t[ROUTER][1:].contiguous()}),
            r"layers\.1\.mlp\.gate\.weight is \[7, 128\], not \[8, 128\]",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    mixtral: Path,
    tmp_path: Path,
    change: Callable[[Tensors], object],
    message: str,
    dequantize: bool,
) -> None:
    folder = _copy(mixtral, tmp_path / "damaged")
    change_tensors(folder, change)

    with pytest.raises(FormatError, match=message):
        load_model(folder, quantization_config=MoeqConfig(dequantize=dequantize))


def _no_layer(config: dict[str, Any]) -> None:
    config["expert_bits"].popitem()


def _no_such_linear(config: dict[str, Any]) -> None:
    config["linear"]["config_groups"]["group_0"]["targets"].append("model.layers.9.fc")


def _fewer_experts(config: dict[str, Any]) -> None:
    for widths in config["expert_bits"].values():
        widths["w13"].pop(), widths["w2"].pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_layer, "expert_bits has no entry for model.layers.1.mlp.experts"),
        (_fewer_experts, "expert_bits lists 7 experts, the model has 8"),
        (_no_such_linear, "linear_bits names model.layers.9.fc, and this release"),
        (lambda config: config.update(format_version=2), "format_version 2 is not supported"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    mixtral: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = _copy(mixtral, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(FormatError, match=message):
        load_model(folder)


def test_a_truncated_file_is_named(mixtral: Path, tmp_path: Path) -> None:
    folder = _copy(mixtral, tmp_path / "cut")
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])

    with pytest.raises(FormatError, match=f"{file.name} is damaged"):
        load_model(folder)

    (folder / "moeq_manifest.json").write_bytes((mixtral / "moeq_manifest.json").read_bytes())
    with pytest.raises(FormatError, match=f"{file.name} has .* bytes instead of"):
        load_model(folder)


def test_what_cannot_be_done_is_refused(
    mixtral: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = _copy(mixtral, tmp_path / "copy")
    model = load_model(folder)
    with pytest.raises(RuntimeError, match=r"no backward pass.*dequantize=True"):
        model(TOKENS, labels=TOKENS).loss.backward()
    with pytest.raises(ValueError, match="save into another folder"):
        model.save_pretrained(folder)
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "again", push_to_hub=True)
    with pytest.raises(ValueError, match="give no `state_dict`"):
        model.save_pretrained(tmp_path / "again", state_dict=model.state_dict())
    attention = model.model.layers[0].self_attn
    attention.q_proj.bias = torch.nn.Parameter(torch.ones(attention.q_proj.out_features))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.bias is no tensor of"):
        model.save_pretrained(tmp_path / "again")
    attention.q_proj.bias = None
    with pytest.raises(AttributeError, match=r"layers.0.self_attn.q_proj is packed.*dequantize"):
        attention.q_proj.weight.data += 1  # as peft does to merge an adapter
    assert attention.q_proj.weight.dtype == model.dtype
    change_tensors(folder, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(FormatError, match="has changed since"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(RuntimeError, match='device_map="meta"'):
        model.to("meta")
    with pytest.raises(ValueError, match="`moeq quantize` has written"):
        load_model(tiny_model("mixtral"), quantization_config=MoeqConfig())


def test_a_dequantized_model_trains(mixtral: Path) -> None:
    model = load_model(mixtral, quantization_config=MoeqConfig(dequantize=True))
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[0].mlp.experts.down_proj.grad.abs().sum() > 0


@pytest.mark.parametrize("dense", [False, True])
def test_an_adapter_trained_dequantized_is_used_packed(
    packed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: bool
) -> None:
    mixtral = packed("mixtral", dense)
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("MOEQ_KERNEL", "reference")
    plain = load_model(mixtral, quantization_config=MoeqConfig(dequantize=True))
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trained = peft.get_peft_model(plain, options)
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        trained(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    trained.save_pretrained(tmp_path / "adapter")
    expected = _logits(trained)
    assert (expected - _logits(load_model(mixtral))).abs().max() > 0.1

    adapted = peft.PeftModel.from_pretrained(load_model(mixtral), tmp_path / "adapter")
    torch.testing.assert_close(_logits(adapted), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="would be lost"):
        adapted.base_model.model.save_pretrained(tmp_path / "again")

    if dense:  # there is no weight to merge into
        with pytest.raises(AttributeError, match="q_proj is packed and has no weight"):
            adapted.merge_and_unload()
        return
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        _logits(load_model(tmp_path / "merged")), expected, atol=1e-4, rtol=0
    )


def test_what_stands_for_a_packed_weight_can_be_copied() -> None:
    weight = copy.deepcopy(NoWeight("q_proj", torch.device("cpu"), torch.float32))
    with pytest.raises(AttributeError, match=r"q_proj is packed .*dequantize=True"):
        _ = weight.data
