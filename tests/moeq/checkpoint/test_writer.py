"""Conversions: what is written, against an independent reader, and that failures leave nothing."""

import json
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from moeq.checkpoint import SourceModel
from moeq.checkpoint.data_free import DataFree
from moeq.checkpoint.model_card import write_model_card
from moeq.checkpoint.verify import verify_checkpoint
from moeq.checkpoint.writer import Conversion
from moeq.errors import MoeqError
from support.checkpoints import (
    CONTAINERS,
    MATRICES,
    NUM_EXPERTS,
    Tensors,
    mixtral_tensors,
    plan_dict,
    write_checkpoint,
)
from support.models import ENCODER_DECODERS, FAMILIES, as_released
from support.packed import write_packed
from support.reference import dequantize, dequantize_checkpoint
from vllm_moeq.format import BitPlan, LayerBits, packed_bytes

# Squared error of a Gaussian at each width, as a share of its variance, is below this.
ERROR = {1: 0.40, 2: 0.14, 3: 0.045, 4: 0.015, 8: 1e-4}
WIDTHS = {CONTAINERS[0]: [1, 2, 3, 4], CONTAINERS[1]: [8, 1, 4, 2]}


def _convert(
    source: Path, output: Path, plan: BitPlan | None = None, shard_bytes: int = 1 << 30
) -> Path:
    return write_packed(source, output, plan or BitPlan.from_dict(plan_dict(WIDTHS)), shard_bytes)


def _load(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("source"), architectures=["X"], dtype="bfloat16"
    )


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _convert(source, tmp_path_factory.mktemp("packed") / "out")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("expert", range(NUM_EXPERTS))
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_matrix_is_its_source_at_its_own_width(
    packed: Path, container: str, expert: int, matrix: str
) -> None:
    stored, name = _load(packed), f"{container}.{expert}.{matrix}"
    codes, scale = stored[f"{name}.weight_packed"], stored[f"{name}.weight_scale"]
    width = WIDTHS[container][expert]
    assert codes.shape[1] * 8 == width * MATRICES[matrix][1]
    result = dequantize(codes, scale, stored[f"{name}.weight_zero_point"], group_size=64)
    weight = mixtral_tensors()[f"{name}.weight"].double()
    assert (result - weight).square().mean() < ERROR[width] * weight.square().mean()


def test_w13_and_w2_may_have_different_widths(source: Path, tmp_path: Path) -> None:
    bits = LayerBits((4, 1, 2, 3), (8, 2, 1, 1))
    _convert(source, tmp_path / "out", BitPlan(64, dict.fromkeys(CONTAINERS, bits)))
    stored = _load(tmp_path / "out")
    for matrix, widths in (("w1", bits.w13), ("w3", bits.w13), ("w2", bits.w2)):
        for expert, width in enumerate(widths):
            codes = stored[f"{CONTAINERS[1]}.{expert}.{matrix}.weight_packed"]
            assert codes.shape[1] * 8 == width * MATRICES[matrix][1]


def test_all_other_tensors_are_untouched(packed: Path) -> None:
    stored = _load(packed)
    others = {name: t for name, t in mixtral_tensors().items() if ".experts." not in name}
    for name, tensor in others.items():
        assert stored.pop(name).dtype == tensor.dtype
        assert torch.equal(_load(packed)[name], tensor)
    assert all(name.endswith(("_packed", "_scale", "_zero_point")) for name in stored)


def test_config_keeps_its_keys_and_gains_the_plan(source: Path, packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert "import vllm_moeq.hf" in config.pop("transformers_weights")
    assert config == json.loads((source / "config.json").read_text())
    assert quantization["quant_method"] == "moeq"
    assert {name: bits["w13"] for name, bits in quantization["expert_bits"].items()} == WIDTHS


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_do_not_depend_on_the_split_into_files(
    packed: Path, tmp_path: Path, shards: int, shard_bytes: int
) -> None:
    source = write_checkpoint(tmp_path / "source", shards=shards)
    stored, expected = _load(_convert(source, tmp_path / "out", None, shard_bytes)), _load(packed)
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], expected[name]) for name in stored)


def test_files_keep_to_the_shard_size(source: Path, tmp_path: Path) -> None:
    limit = 20_000
    files = sorted(_convert(source, tmp_path / "out", None, limit).glob("*.safetensors"))
    assert len(files) > 5
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= limit


def test_index_lists_every_tensor_where_it_is(source: Path, tmp_path: Path) -> None:
    output = _convert(source, tmp_path / "out", None, 20_000)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    where: dict[str, str] = {}
    for file in output.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            where |= dict.fromkeys(handle.keys(), file.name)
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in _load(output).values())


def test_announced_size_is_the_size_of_the_tensors(source: Path, packed: Path) -> None:
    plan = BitPlan.from_dict(plan_dict(WIDTHS))
    conversion = Conversion.prepare(SourceModel.open(source), plan)
    assert conversion.output_bytes == sum(tensor.nbytes for tensor in _load(packed).values())


def test_other_files_travel_along(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "tokenizer.json").write_bytes(b"\x00tokens")
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ tools }}")
    output = _convert(source, tmp_path / "out")
    assert (output / "tokenizer.json").read_bytes() == b"\x00tokens"
    assert (output / templates.name / "tools.jinja").read_text() == "{{ tools }}"
    assert verify_checkpoint(output) == []


def test_every_file_is_readable_alike(packed: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in packed.iterdir()}
    assert len(modes) == 1


def test_result_verifies(packed: Path) -> None:
    assert verify_checkpoint(packed) == []


def test_work_folder_is_gone(packed: Path) -> None:
    assert [path.name for path in packed.parent.iterdir()] == ["out"]


def test_model_card_keeps_the_licence_and_tags(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\ntags:\n- chat\n---\n# Old text\n")
    card = ModelCard.load(_convert(source, tmp_path / "out") / "README.md")
    assert card.data.license == "mit"
    assert set(card.data.tags) == {"chat", "moe", "moeq", "quantized"}
    assert "Old text" not in card.text


def test_the_card_of_a_hub_model_names_it_and_shows_plan_and_quality(
    source: Path, tmp_path: Path
) -> None:
    model = replace(SourceModel.open(source), name="someone/a-model")
    tried = [
        {
            "strategy": name,
            "expert_bytes": 1,
            "divergence": kl,
            "loss_increase": 0.5,
            "tokens": 7,
        }
        for name, kl in (("sensitivity", 0.125), ("pmq", 0.25), ("random:0", 0.75))
    ]
    plan = BitPlan.from_dict(plan_dict(WIDTHS, provenance={"details": {"tried": tried}}))
    Conversion.prepare(model, plan).write(tmp_path / "out", DataFree(model, "rtn", 64))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "someone/a-model"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert {"moe", "moeq", "quantized"} <= set(card.data.tags)
    # Layer 0 has widths 1, 2, 3, 4, layer 1 has 8, 1, 4, 2.
    assert f"| `{CONTAINERS[1]}` | 1 / 1 | 1 / 1 | 0 / 0 | 1 / 1 | 1 / 1 |" in card.text
    for words in ("0.12500 nats per token", "2 other plans", "had 0.25000", "import vllm_moeq.hf"):
        assert words in card.text.replace("\n", " ")


@pytest.mark.parametrize(
    ("linear", "words"),
    [
        ((), "Routers, attention, norms and embeddings are not quantized"),
        (("q_proj",), "norms, token embeddings and the output head are not quantized"),
        (("q_proj", "lm_head"), "dense MLPs and the output head have 4, 8 or 16 bits"),
        (("embed_tokens", "lm_head"), "compressed-tensors. Routers and norms are not quantized"),
    ],
)
def test_the_card_says_what_is_quantized(
    tmp_path: Path, linear: tuple[str, ...], words: str
) -> None:
    bits = {f"model.{name}": 4 for name in linear}
    plan = replace(BitPlan.from_dict(plan_dict(WIDTHS)), linear_bits=bits)
    write_model_card(tmp_path, plan, "someone/a-model")
    assert words in (tmp_path / "README.md").read_text().replace("\n", " ")


@pytest.mark.filterwarnings("ignore:the header of README.md is unreadable")
@pytest.mark.parametrize(
    "text", ["---\nlicense: [\n---\n", "---\njust text\n---\n", "---\ntags: chat\n---\n", ""]
)
def test_an_odd_model_card_does_not_stop_the_conversion(tmp_path: Path, text: str) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "README.md").write_text(text)
    card = ModelCard.load(_convert(source, tmp_path / "out") / "README.md")
    assert {"moe", "moeq", "quantized"} <= set(card.data.tags)
    assert all(len(tag) > 1 for tag in card.data.tags)


def test_a_plan_without_averages_gets_true_ones(source: Path, packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    provenance = config["quantization_config"]["provenance"]
    weights = sum(rows * columns for rows, columns in MATRICES.values())
    size = sum(
        packed_bytes(*MATRICES[matrix], width, 64)
        for widths in WIDTHS.values()
        for width in widths
        for matrix in MATRICES
    )
    assert provenance["achieved_bits"] == (1 + 2 + 3 + 4 + 8 + 1 + 4 + 2) / 8
    assert provenance["expert_bytes"] == size
    assert provenance["bits_per_weight"] == pytest.approx(size * 8 / (8 * weights))
    assert "nan" not in (packed / "README.md").read_text()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_weights_that_cannot_be_quantized_are_named_and_leave_nothing(
    tmp_path: Path, bad: float
) -> None:
    tensors, name = mixtral_tensors(), f"{CONTAINERS[1]}.3.w2.weight"
    tensors[name][1, 2] = bad
    source = write_checkpoint(tmp_path / "source", tensors)
    with pytest.raises(MoeqError, match=f"cannot quantize {name}"):
        _convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _make_folder(path: Path) -> None:
    path.mkdir()


def _make_file(path: Path) -> None:
    path.write_text("precious")


def _make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_make_folder, _make_file, _make_dangling_link])
def test_nothing_that_exists_is_overwritten(
    source: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "out")
    with pytest.raises(MoeqError, match=f"{tmp_path / 'out'} exists already"):
        _convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_in_a_folder_that_does_not_exist_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(MoeqError, match=f"{tmp_path / 'a'} of `output` does not exist"):
        _convert(source, tmp_path / "a" / "out")


def test_remains_of_a_killed_run_are_replaced(source: Path, packed: Path, tmp_path: Path) -> None:
    remains = tmp_path / ".out.moeq" / "output"
    remains.mkdir(parents=True)
    (remains / "model-00009-of-00009.safetensors").write_bytes(b"half")
    output = _convert(source, tmp_path / "out")
    assert {path.name for path in output.iterdir()} == {path.name for path in packed.iterdir()}
    assert not remains.parent.exists()


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODER_DECODERS])
def test_every_family_converts_and_verifies(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    folder = tiny_model(family)
    layers = SourceModel.open(folder).layers
    bits = LayerBits((8, 4, 3, 2, 8, 4, 3, 2), (4, 8, 2, 3, 8, 4, 3, 2))
    plan = BitPlan(32, {layer.container: bits for layer in layers})
    output = _convert(folder, tmp_path / "out", plan)
    assert verify_checkpoint(output) == []
    plain = dequantize_checkpoint(output, tmp_path / "plain")
    kept = {as_released(name): tensor.float() for name, tensor in _load(folder).items()}
    assert set(_load(plain)) == set(kept)
    of_experts = re.compile(r"\.experts\.|block_sparse_moe\.(input|output)_linear\.")
    for name, tensor in _load(plain).items():
        assert of_experts.search(name) or torch.equal(tensor, kept[name]), name
    weights, original = SourceModel.open(plain), SourceModel.open(folder)
    for layer in layers:
        for expert, matrix, projection in layer.weights():
            name = layer.tensor_name(expert, matrix)
            wanted = original.tensor(name).float()
            error = (weights.tensor(name) - wanted).square().mean()
            width = getattr(bits, projection)[expert]
            assert error < ERROR[width] * wanted.square().mean()
