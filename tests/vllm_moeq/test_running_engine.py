"""What is done to a running engine: adapters come and go, weights are loaded again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.checkpoints import change_tensors
from support.cli import run_moeq
from support.engine import Completion, assert_same, launch, run_engine, run_transformers
from support.linear import pack_linear
from support.packed import pack_mixed
from support.reference import dequantize_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

HIDDEN, RANK, ALPHA = 128, 8, 24
ATTENTION = "model.layers.{}.self_attn.{}_proj"


@pytest.fixture(scope="module")
def packed(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("running") / "packed"
    return pack_linear(pack_mixed(tiny_model("mixtral"), folder))


@pytest.fixture(scope="module")
def plain(packed: Path) -> Path:
    return dequantize_checkpoint(packed, packed.with_name("plain"))


@pytest.fixture(scope="module")
def expected(plain: Path) -> list[Completion]:
    return run_transformers(plain)


def _copy_with(
    folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]
) -> Path:
    """Copy a checkpoint of one shard and change its tensors."""
    shutil.copytree(folder, target)
    change_tensors(target, change)
    return target


def _adapter(folder: Path, modules: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Write a LoRA adapter in peft's files; return what it adds to each module's weight.

    Args:
        folder: To be made.
        modules: Names to the rows and columns of their weights.
    """
    generator = torch.Generator().manual_seed(1)
    tensors, deltas = {}, {}
    for name, (rows, columns) in modules.items():
        down = torch.randn(RANK, columns, generator=generator) * 0.1
        up = torch.randn(rows, RANK, generator=generator) * 0.1
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        deltas[f"{name}.weight"] = up @ down * (ALPHA / RANK)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def _generated(completions: list[Completion]) -> list[Completion]:
    """Leave out the prompts' log-probabilities."""
    return [completion._replace(prompt_logprobs=[]) for completion in completions]


def test_adapters_serve_attention_and_are_refused_for_experts(
    packed: Path, plain: Path, expected: list[Completion], tmp_path: Path
) -> None:
    deltas = _adapter(
        tmp_path / "attention",
        {
            ATTENTION.format(layer, letter): (rows, HIDDEN)
            for layer in (0, 1)
            for letter, rows in (("q", HIDDEN), ("v", HIDDEN // 2))
        },
    )

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name, delta in deltas.items():
            tensors[name] += delta

    adapted = _generated(run_transformers(_copy_with(plain, tmp_path / "adapted", add)))
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    _adapter(tmp_path / "experts", {expert: (256, HIDDEN), ATTENTION.format(0, "q"): (HIDDEN,) * 2})

    run = run_engine(
        packed,
        enable_lora=True,
        prompt_logprobs=False,  # vLLM 0.32's LoRA on the CPU fails at them
        actions=[
            ("adapter", str(tmp_path / "attention")),
            ("generate", None),
            ("add adapter", str(tmp_path / "experts")),
            ("generate", None),
            ("reload", str(packed)),
        ],
    )

    without, with_adapter, *after = run.completions
    for completions in (without, *after):
        assert_same(completions, _generated(expected))
    assert len(after) == 3
    assert_same(with_adapter, adapted)
    with pytest.raises(AssertionError):
        assert_same(adapted, _generated(expected))
    (refusal,) = run.refusals
    assert expert in refusal


def test_lora_on_experts_by_name_is_refused(packed: Path) -> None:
    process = launch(packed, enable_lora=True, lora_target_modules=["q_proj", "experts"])

    assert process.returncode != 0
    assert "LoRA on moeq experts is not supported" in process.log


def _other_weights(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            tensor *= 1.25
        if name.endswith("layernorm.weight"):
            tensor *= 0.75


def test_weights_are_loaded_again(packed: Path, expected: list[Completion], tmp_path: Path) -> None:
    other = _copy_with(packed, tmp_path / "other", _other_weights)
    changed = run_transformers(dequantize_checkpoint(other, tmp_path / "plain"))

    run = run_engine(packed, actions=[("reload", str(other)), ("reload", str(packed))])

    assert run.refusals == []
    first, second, third = run.completions
    assert_same(first, expected)
    assert_same(second, changed)
    assert_same(third, expected)
    with pytest.raises(AssertionError):
        assert_same(changed, expected)


MISSING = (
    "model.layers.0.input_layernorm.weight",  # all of a layer: vLLM would keep the old weights
    "model.layers.1.block_sparse_moe.experts.5.w3.weight_scale",
    "model.layers.1.self_attn.k_proj.weight_packed",  # a part: the rest would be uninitialised
)


def _lacks_tensors(tensors: dict[str, torch.Tensor]) -> None:
    for name in MISSING:
        tensors.pop(name)


@pytest.mark.parametrize("kind", ["another plan", "incomplete"])
def test_a_failed_reload_is_told_and_never_served(
    packed: Path, tiny_model: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    if kind == "another plan":
        other = tmp_path / "other"
        plan = ("--bits", 4, "--group-size", 32, "--strategy", "uniform", "--calib", "none")
        done = run_moeq("quantize", tiny_model("mixtral"), "-o", other, *plan)
        assert done.returncode == 0, done.stderr
        message = "has another one than the engine was started with"
    else:
        other = _copy_with(packed, tmp_path / "other", _lacks_tensors)
        message = f"lacks tensors that the running model was loaded with: {', '.join(MISSING)}. "

    run = run_engine(packed, actions=[("reload", str(other)), ("generate", None)])

    assert len(run.completions) == 1
    reload, generation = run.refusals
    assert message in reload
    assert "Error: " in generation


def test_speculation_prefix_cache_and_chunks_change_no_answer(
    packed: Path, expected: list[Completion]
) -> None:
    run = run_engine(
        packed,
        prompt_logprobs=False,  # vLLM reads no cached prefix for requests that want them
        actions=[("generate", None)],
        enable_prefix_caching=True,
        block_size=32,
        max_num_batched_tokens=16,  # less than a prompt
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        },
        disable_log_stats=False,
    )

    for completions in run.completions:
        assert_same(completions, _generated(expected))
    assert run.metrics["vllm:prefix_cache_hits"] > 0
    assert run.metrics["vllm:spec_decode_num_accepted_tokens"] > 0
