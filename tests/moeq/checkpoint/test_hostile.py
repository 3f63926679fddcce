"""Files that lie: every reader refuses them with an error that it has words for.

No crash, no hang, no memory beyond that of the files, nothing outside of them, no code.
``MOEQ_LIES=5000`` tells as many lies instead of the few of CI.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeq.errors import MoeqError
from moeq.model.text import calibration_sequences
from support.checkpoints import HIDDEN, mixtral_tensors, plan_dict, write_checkpoint
from support.cli import run_moeq
from support.hostile import MANIFEST, Lie, copied, guarded, lies, tell
from support.models import save_tokenizer
from vllm_moeq.format import CheckpointConfig, FormatError
from vllm_moeq.hf.config import MoeqConfig
from vllm_moeq.hf.files import PackedFiles
from vllm_moeq.kernels.cpu import unavailable

pytestmark = pytest.mark.slow

FEW = 30
MANY = int(os.environ.get("MOEQ_LIES", FEW))
VOCABULARY = 320
INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.block_sparse_moe"
OPTIONS = ("--calib", "none", "--bits", 2.5, "--group-size", 32)
fuzzed = settings(
    max_examples=MANY, derandomize=MANY == FEW, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two files, with a tokenizer."""
    unavailable(torch.device("cpu"))  # compiles the kernel, which nothing may do under guard
    tensors = mixtral_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(VOCABULARY, HIDDEN).bfloat16()
    folder = tmp_path_factory.mktemp("source") / "model"
    write_checkpoint(folder, tensors, shards=2, vocab_size=VOCABULARY)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same packed, dense layers too, with a measured plan and all reports."""
    out = tmp_path_factory.mktemp("packed") / "model"
    text = out.with_name("text.txt")
    text.write_text("Bytes are tokens. " * 200)
    done = run_moeq(
        "quantize", source, "-o", out, "--bits", 2.5, "--group-size", 32, "--calib", text,
        "--nsamples", 8, "--seqlen", 16, "--dense-bits", 8, "--max-shard-size", "100KB",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def _run(*arguments: object) -> str:
    """Run a command, which may succeed or say why it does not; return what it says then."""
    with guarded():
        done = run_moeq(*arguments)
    assert done.returncode in (0, 1), done
    if done.returncode:
        assert done.stderr.strip(), done
        assert "Traceback" not in done.stderr
    return done.stderr


def _read_packed(folder: Path) -> None:
    """Read a packed checkpoint in all ways."""
    _run("verify", folder)
    _run("inspect", folder, "--json")
    page = folder.with_name("page.html")
    page.unlink(missing_ok=True)
    _run("inspect", folder, "--html", page)
    try:
        config = json.loads((folder / "config.json").read_text())
        _accepted(config["quantization_config"])
        plan = CheckpointConfig.from_dict(config["quantization_config"]).plan
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # not JSON, or without any; or refused, as it may be
    with guarded():
        try:
            files = PackedFiles([str(path) for path in folder.glob("*.safetensors")], plan)
            with files.opened() as read:
                for name in files.names:
                    read(name)
        except FormatError:
            pass


def _accepted(config: Any) -> bool:
    """Say whether a ``quantization_config`` is taken; else there must be words for it."""
    with guarded():
        try:
            CheckpointConfig.from_dict(config)
            if isinstance(config, dict):
                MoeqConfig(**{str(key): value for key, value in config.items()}).to_dict()
        except FormatError as error:
            assert str(error)
            return False
    return True


def _read_source(folder: Path) -> None:
    """Read a source in all ways."""
    _run("plan", folder, *OPTIONS, "--dense-bits", 8)
    out = folder.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    _run("quantize", folder, "-o", out, *OPTIONS)


@fuzzed
@given(data=st.data())
def test_lies_of_a_packed_checkpoint(packed: Path, scratch: Path, data: st.DataObject) -> None:
    lie = data.draw(lies(packed, "*.json", "*.safetensors"))
    folder = copied(packed, scratch / "packed")
    tell(lie, folder)
    _read_packed(folder)


@fuzzed
@given(data=st.data())
def test_lies_of_a_source(source: Path, scratch: Path, data: st.DataObject) -> None:
    lie = data.draw(lies(source, "*.json", "*.safetensors"))
    folder = copied(source, scratch / "source")
    tell(lie, folder)
    _read_source(folder)


PLAN = plan_dict(
    linear_bits={"model.layers.0.self_attn.o_proj": 8},
    provenance={
        "strategy": "auto", "requested_bits": 2.5, "expert_bytes": 1, "source": "x",
        "details": {
            "zeta": 0.5,
            "tried": [
                {"strategy": "auto", "total_bytes": 1, "divergence": 0.1, "loss_increase": 0.1,
                 "tokens": 5},
            ],
        },
    },
)  # fmt: skip


@fuzzed
@given(data=st.data())
def test_lies_of_a_plan(source: Path, scratch: Path, data: st.DataObject) -> None:
    folder = scratch / "plan"
    folder.mkdir(exist_ok=True)
    plan, page = folder / "plan.json", folder / "page.html"
    plan.write_text(json.dumps(PLAN))
    tell(data.draw(lies(folder, "plan.json")), folder)
    page.unlink(missing_ok=True)
    _run("inspect", plan)
    _run("inspect", plan, "--html", page)
    command = ("quantize", source, "-o", folder / "out", "--plan", plan, "--method", "rtn")
    _run(*command, "--dry-run")


ROWS = (
    '{"text": "Bytes are tokens, again and again and again."}', '{"source": "a", "target": "b"}',
    '{"text": 1}', '{"text": null}', '{"text": "\\ud800"}', '{"text": "\\u0000"}', "[]", '""', "",
    '{"text": "a"', "{" * 100_000, '{"text": ' + "[" * 100_000, "1" * 5000, '{"text": NaN}', "\0",
)  # fmt: skip


@fuzzed
@given(rows=st.lists(st.sampled_from(ROWS), max_size=5), tail=st.binary(max_size=8))
def test_lies_of_a_calibration_text(
    source: Path, scratch: Path, rows: list[str], tail: bytes
) -> None:
    text = scratch / "text.jsonl"
    text.write_bytes("\n".join(rows).encode() + tail)
    with guarded():
        try:
            tokens = calibration_sequences(source, str(text), 4, 16, 0)
        except MoeqError as error:
            assert str(text) in str(error)
        else:
            assert tokens.shape[1] == 16 and tokens.dtype == torch.int64


@fuzzed
@given(data=st.data())
def test_lies_of_a_tokenizer(source: Path, scratch: Path, data: st.DataObject) -> None:
    lie = data.draw(lies(source, "tokenizer*.json"))
    folder, text = copied(source, scratch / "tokenizer"), scratch / "text.txt"
    text.write_text("Bytes are tokens. " * 20)
    tell(lie, folder)
    with guarded():
        try:
            tokens = calibration_sequences(folder, str(text), 4, 16, 0)
        except MoeqError as error:
            assert str(folder) in str(error) or str(text) in str(error)
        else:
            assert tokens.shape[1] == 16 and tokens.max() < VOCABULARY


def test_a_tokenizer_that_fails_at_a_text_is_named(source: Path, tmp_path: Path) -> None:
    folder, text = copied(source, tmp_path / "tokenizer"), tmp_path / "text.txt"
    text.write_text("Bytes are tokens. " * 20)
    unknown = '{"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "missing"}'
    tell(Lie("tokenizer.json", "value", ("model",), unknown), folder)
    with pytest.raises(MoeqError, match=f"{folder}: cannot read its tokenizer"):
        calibration_sequences(folder, str(text), 4, 16, 0)


FOUND = (
    Lie("config.json", "value", (), "[" * 100_000),
    Lie("config.json", "value", ("num_hidden_layers",), "1000000000"),
    Lie("config.json", "value", ("num_local_experts",), "1000000000"),
    Lie("config.json", "value", ("num_nextn_predict_layers",), '"x"'),
    Lie("config.json", "value", ("hidden_size",), "1" + "0" * 5000),
    Lie("config.json", "value", ("model_type",), '"\\ud800"'),
    Lie("config.json", "value", ("quantization_config",), "[]"),
    Lie("config.json", "value", ("quantization_config",), '{"quant_method": "fp8", '
        '"weight_block_size": [0, 0]}'),
    Lie("config.json", "value", ("quantization_config",), '{"quant_method": "compressed-tensors", '
        '"config_groups": {"a": 1}}'),
    Lie(INDEX, "value", ("weight_map", "lm_head.weight"), "[]"),
    Lie(INDEX, "value", ("weight_map", "lm_head.weight"), '"' + "x" * 256 + '"'),
    Lie(MANIFEST, "value", ("files", "config.json"), '{"size": [], "sha256": {}}'),
    Lie(MANIFEST, "key", ("files", "config.json"), "x" * 256),
    Lie(MANIFEST, "key", ("files", "config.json"), "x/" * 2048 + "x"),
)  # fmt: skip
"""What once was no error with words, or none in time."""


@pytest.mark.parametrize("lie", FOUND, ids=lambda lie: f"{lie.file}-{lie.text[:30]}")
def test_lies_that_were_believed_once(lie: Lie, source: Path, packed: Path, scratch: Path) -> None:
    readers: dict[Path, Callable[[Path], None]] = {source: _read_source, packed: _read_packed}
    for folder, read in readers.items():
        if (folder / lie.file).exists():
            lying = copied(folder, scratch / "believed")
            tell(lie, lying)
            read(lying)


@pytest.mark.parametrize(
    "name", ["../canary.safetensors", "/etc/passwd", "x/../../canary.safetensors", "a\0b", ""]
)
def test_no_name_leads_out_of_the_folder(
    name: str, source: Path, packed: Path, scratch: Path
) -> None:
    words = f"names the file {name!r}, which is not inside its folder"
    lying = copied(source, scratch / "escape")
    tell(Lie(INDEX, "value", ("weight_map", "lm_head.weight"), json.dumps(name)), lying)
    assert words in _run("plan", lying, *OPTIONS)
    lying = copied(packed, scratch / "escape")
    tell(Lie(MANIFEST, "key", ("files", "config.json"), name), lying)
    assert words in _run("verify", lying)


def test_no_file_outside_is_copied_into_the_result(source: Path, tmp_path: Path) -> None:
    model, out = copied(source, tmp_path / "lies"), tmp_path / "out"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("mine")
    link, words = model / "notes.txt", f"{outside / 'secret'}, outside the checkpoint"
    link.symlink_to(outside / "secret")
    assert f"{link} is a link to {words}" in _run("quantize", model, "-o", out, *OPTIONS)
    link.unlink()
    (model / "additional_chat_templates").symlink_to(outside)
    assert words in _run("quantize", model, "-o", out, *OPTIONS)
    assert not out.exists()


def test_links_of_the_hubs_cache_are_followed(source: Path, tmp_path: Path) -> None:
    blobs, snapshot, out = tmp_path / "blobs", tmp_path / "snapshots" / "abc", tmp_path / "out"
    shutil.copytree(source, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    done = run_moeq("quantize", snapshot, "-o", out, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (out / "tokenizer.json").is_symlink()


def test_config_json_brings_no_code(source: Path, tmp_path: Path) -> None:
    model, text = copied(source, tmp_path / "lies"), tmp_path / "text.txt"
    (model / "modeling.py").write_text("raise SystemExit('this must not run')")
    config = json.loads((model / "config.json").read_text())
    config |= {
        "attn_implementation": "somebody/attention", "_attn_implementation": "somebody/attention",
        "experts_implementation": "somebody/experts",
        "auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"},
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    text.write_text("Bytes are tokens. " * 200)
    with guarded():
        done = run_moeq(
            "quantize", model, "-o", tmp_path / "out", "--bits", 2, "--group-size", 32, "--calib",
            text, "--nsamples", 4, "--seqlen", 16, "--strategy", "uniform",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_tokens_that_the_model_does_not_have_are_refused(source: Path, tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    write_checkpoint(model)  # with 32 tokens
    save_tokenizer(model)
    text.write_text("Bytes are tokens. " * 200)
    said = _run(
        "quantize", model, "-o", tmp_path / "out", "--bits", 2, "--group-size", 32, "--calib", text,
        "--nsamples", 4, "--seqlen", 16, "--strategy", "uniform",
    )  # fmt: skip
    assert re.search(r"model: the tokenizer gives the token \d+, but the model has 32 of", said)
