"""Tiny checkpoints of every supported family, made by transformers with random weights."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 320
NUM_EXPERTS = 8
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    # Large enough for logits that differ clearly, so that greedy tokens are no coin toss.
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}


def _mixtral() -> torch.nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            **_COMMON, num_key_value_heads=2, intermediate_size=256, num_local_experts=NUM_EXPERTS
        )
    )


def _qwen2_moe() -> torch.nn.Module:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_COMMON,
            num_key_value_heads=2,
            intermediate_size=256,
            moe_intermediate_size=128,
            shared_expert_intermediate_size=256,
            num_experts=NUM_EXPERTS,
        )
    )


def _qwen3_moe() -> torch.nn.Module:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_COMMON,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=256,
            moe_intermediate_size=128,
            num_experts=NUM_EXPERTS,
            norm_topk_prob=True,
        )
    )


def _olmoe() -> torch.nn.Module:
    return OlmoeForCausalLM(
        OlmoeConfig(
            **_COMMON, num_key_value_heads=4, intermediate_size=128, num_experts=NUM_EXPERTS
        )
    )


_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "routed_scaling_factor": 1.0,
}


def _deepseek_v2() -> torch.nn.Module:
    # As DeepSeek-V2-Lite: softmax routing without expert groups.
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **_COMMON | _DEEPSEEK | {"n_group": 1, "topk_group": 1},
            q_lora_rank=None,
            topk_method="greedy",
        )
    )


def _deepseek_v3() -> torch.nn.Module:
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_COMMON | _DEEPSEEK,
            q_lora_rank=128,
            norm_topk_prob=True,
            # transformers assumes these two; vLLM reads them, as in DeepSeek's own config.json.
            scoring_func="sigmoid",
            topk_method="noaux_tc",
        )
    )


def _glm4_moe() -> torch.nn.Module:
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **_COMMON,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=256,
            moe_intermediate_size=128,
            n_routed_experts=NUM_EXPERTS,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            norm_topk_prob=True,
        )
    )


def _minimax_m2() -> torch.nn.Module:
    return MiniMaxM2ForCausalLM(
        MiniMaxM2Config(
            **_COMMON,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=128,
            num_local_experts=NUM_EXPERTS,
            # Only vLLM reads these, as in MiniMax's own config.json.
            rotary_dim=32,
            scoring_func="sigmoid",
            use_routing_bias=True,
        )
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "minimax_m2": _minimax_m2,
}


def save_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def make_model(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a tiny random checkpoint of a family; the same one every time."""
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def add_prediction_layer(model: Path, folder: Path, prefix: str, *, predicts: bool = False) -> Path:
    """Write a copy of a checkpoint with a layer for multi-token prediction, as DeepSeek-V3's.

    Args:
        model: Checkpoint of two layers in one file.
        folder: The copy.
        prefix: Of the new layer's tensors.
        predicts: It is right far more often than chance: all layers add little to the residual
            stream, and its own starts with the embedding of the latest token.
    """
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    last = "model.layers.1."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[prefix + name.removeprefix(last)] = tensors[name].roll(1, 0)
    hidden = _COMMON["hidden_size"]
    projection = torch.randn(hidden, 2 * hidden, generator=generator) / 16
    if predicts:
        projection = torch.eye(hidden, 2 * hidden)
        for name in tensors:
            if re.search(r"\.(o_proj|down_proj)(\.weight)?$", name):
                tensors[name] = tensors[name] / 1024
    tensors[f"{prefix}eh_proj.weight"] = projection.bfloat16()
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{prefix}{name}.weight"] = torch.ones(hidden).bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return folder
