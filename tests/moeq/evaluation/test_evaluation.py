"""``moeq eval`` against transformers, on checkpoints dequantized by other code."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moeq.checkpoint import SourceModel
from moeq.cli import main
from moeq.errors import MoeqError
from moeq.evaluation.whole import WholeModel
from moeq.model.text import calibration_sequences, evaluation_sequences
from support.cli import run_moeq, run_moeq_alone
from support.models import FAMILIES, NOT_LAYERWISE, load_model
from support.reference import dequantize_checkpoint

pytestmark = pytest.mark.slow

TEXTS = {name: f"{name}: " + " ".join(f"{i * k % 89}" for i in range(99)) for name, k in
         {"a": 3, "b": 7}.items()}  # fmt: skip
LENGTH, COUNT = 40, 3
IN_TRANSFORMERS = (
    "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "gemma4_text", "kimi_k2", *NOT_LAYERWISE,
)  # fmt: skip
"""Families that are also, or only, evaluated as whole models."""
CALIBRATED = ("flex_olmo", "glm_moe_dsa", "kimi_k2", "llama4", "gemma4", "minimax_m3_vl")
"""Families whose layers do not just add up what experts give, or that run in another way."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in TEXTS.items():
        (folder / f"{name}.txt").write_text(content)
    (folder / "short.txt").write_text("too short")
    return folder


def _packed(source: Path, target: Path, text: Path | None = None) -> Path:
    """Quantize in this process; by text, with a measured plan and GPTQ, if there is any."""
    options = ["--strategy", "random:1", "--calib", "none"]
    if text is not None:
        options = ["--calib", str(text), "--seqlen", str(LENGTH)]
    options += ["--bits", "2.5", "--group-size", "32"]
    assert main(["quantize", str(source), "-o", str(target), *options]) == 0
    return target


def _evaluate(*arguments: object) -> dict[str, Any]:
    run = run_moeq_alone if "vllm" in arguments else run_moeq  # the engine stays in its process
    done = run("eval", *arguments, "--json", "--seqlen", LENGTH, "--nsamples", COUNT)
    assert done.returncode == 0, done.stderr
    assert "exited unexpectedly" not in done.stderr  # so says vLLM of an engine nobody shut down
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_texts_that_are_left_out_are_named(
    tiny_model: Callable[[str], Path], text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_model("mixtral")
    found = evaluation_sequences(source, str(text), COUNT, LENGTH, 0)
    assert set(found) == {"a", "b"}
    told = "1 of 3 texts left out, for they have less than the 40 tokens of one sequence: short\n"
    assert told in caplog.text
    caplog.clear()
    calibration_sequences(source, str(text), COUNT, LENGTH, 0)
    assert told in caplog.text


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *((family, "reference") for family in FAMILIES if family not in NOT_LAYERWISE),
        *((family, "transformers") for family in IN_TRANSFORMERS),
    ],
)
def test_scores_are_those_of_transformers(
    family: str, backend: str, tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source = tiny_model(family)
    packed = _packed(source, tmp_path / "packed", text if family in CALIBRATED else None)
    assert main(["verify", str(packed)]) == 0
    found = _evaluate(packed, "--against", source, "--text", text, "--backend", backend)

    folders = source, dequantize_checkpoint(packed, tmp_path / "float")
    first, second = (load_model(folder).eval() for folder in folders)
    # As many sequences of a text as there are, so that the draw takes all of them.
    assert set(found["texts"]) == set(TEXTS)
    totals: dict[str, list[float]] = {"loss": [], "divergence": [], "agreement": []}
    for name, content in TEXTS.items():
        ids = [byte + 3 for byte in content.encode()]
        windows = torch.tensor(_as_tokens(source, content)[: len(ids) // LENGTH * LENGTH])
        windows = windows.view(-1, LENGTH)
        count = min(COUNT, len(windows))
        assert found["texts"][name]["tokens"] == count * (LENGTH - 1)
        drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:count]
        with torch.inference_mode():
            p, q = (
                model(windows[drawn]).logits.double().log_softmax(-1) for model in (first, second)
            )
        p, q, following = p[:, :-1], q[:, :-1], windows[drawn][:, 1:, None]
        loss = -q.gather(-1, following).mean().item()
        divergence = (p.exp() * (p - q)).sum(-1).mean().item()
        agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        scores = found["texts"][name]
        assert scores["loss"] == pytest.approx(loss, abs=1e-4)
        assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
        assert scores["original_loss"] == pytest.approx(
            -p.gather(-1, following).mean().item(), abs=1e-4
        )
        assert scores["divergence"] == pytest.approx(divergence, rel=1e-3, abs=1e-5)
        assert scores["agreement"] == pytest.approx(agreement, abs=0.02)  # near ties
        for key, value in (("loss", loss), ("divergence", divergence), ("agreement", agreement)):
            totals[key] += [value] * count
    for key, values in totals.items():
        assert found["total"][key] == pytest.approx(sum(values) / len(values), rel=1e-2)
    assert len(found["routing_shift"]) == len(SourceModel.open(source).layers)


def _as_tokens(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokens: list[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return tokens


@pytest.mark.parametrize("backend", ["reference", "transformers"])
def test_routing_shift_is_that_of_router_logits(
    backend: str, tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source = tiny_model("mixtral")
    packed = _packed(source, tmp_path / "packed")
    found = _evaluate(packed, "--against", source, "--text", text / "a.txt", "--backend", backend)
    windows = torch.tensor(_as_tokens(source, TEXTS["a"]))
    windows = windows[: len(windows) // LENGTH * LENGTH].view(-1, LENGTH)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:COUNT]
    chosen = []
    for folder in (source, dequantize_checkpoint(packed, tmp_path / "float")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits = model(windows[drawn], output_router_logits=True).router_logits
        chosen.append([layer.topk(2).indices.tolist() for layer in logits])
    for shift, first, second in zip(found["routing_shift"].values(), *chosen, strict=True):
        kept = sum(len(set(a) & set(b)) for a, b in zip(first, second, strict=True))
        assert shift == pytest.approx(1 - kept / (2 * len(first)), abs=1e-6)
    assert any(found["routing_shift"].values())  # the test can fail


def test_table(tiny_model: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    source = tiny_model("mixtral")
    packed = _packed(source, tmp_path / "packed")
    done = run_moeq(
        "eval", packed, "--against", source, "--text", text, "--seqlen", LENGTH, "--nsamples", 2
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["text", "a", "b", "all"]
    assert "model.layers.1.block_sparse_moe.experts" in lines[-1]


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_serves_what_the_reference_computes(
    tiny_model: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    source = tiny_model("mixtral")
    packed = _packed(source, tmp_path / "packed")
    options = (packed, "--against", source, "--text", text)
    expected = _evaluate(*options)
    found = _evaluate(*options, "--backend", "vllm", "--dtype", "float32")
    for name in TEXTS:
        ours, theirs = found["texts"][name], expected["texts"][name]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)
        assert ours["original_loss"] == theirs["original_loss"]
        # The likeliest 64 of 320 tokens and the rest: a little less than everything.
        assert 0.5 * theirs["divergence"] < ours["divergence"] < 1.01 * theirs["divergence"]
        assert ours["agreement"] == pytest.approx(theirs["agreement"], abs=0.05)
    assert found["routing_shift"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("SOURCE", "--against", "SOURCE"), "has no quantization_config: this is not a moeq"),
        (("PACKED", "--against", "OTHER"), "does not come from"),
        (("PACKED", "--against", "missing"), "missing is no folder here and no model on the hub"),
        (("PACKED", "--against", "SOURCE", "--seqlen", "4000"), "has the 4000 tokens of one"),
        (("PACKED", "--against", "SOURCE", "--dtype", "float32"), "--dtype has no effect with"),
        (("PACKED", "--against", "SOURCE", "--nsamples", "0"), "--nsamples 0 is not a positive"),
        (("PACKED", "--against", "SOURCE", "--device", "cuda:9"), "--device cuda:9 cannot be"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[str, ...],
    message: str,
    tiny_model: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
) -> None:
    places = {"SOURCE": tiny_model("mixtral"), "OTHER": tiny_model("olmoe")}
    places["PACKED"] = _packed(places["SOURCE"], tmp_path / "packed")
    done = run_moeq("eval", *(places.get(word, word) for word in arguments), "--text", text)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("family", "message"),
    [
        # Of a release to come, say.
        ("minimax_m2", "transformers does not know the model.*--backend vllm"),
        ("llama4_text", "use `backend` reference or vllm"),
    ],
)
def test_models_that_transformers_cannot_exchange_experts_of_are_refused(
    family: str,
    message: str,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = SourceModel.open(tiny_model(family))
    monkeypatch.delitem(CONFIG_MAPPING._mapping, "minimax_m2")
    with pytest.raises(MoeqError, match=message):
        WholeModel(source, torch.device("cpu"))
