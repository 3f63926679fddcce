"""Tiny checkpoints of every supported family, made by transformers with random weights."""

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
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
_SOME_HEADS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 32}
_FEW_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 128, "num_experts": NUM_EXPERTS}
_FEW_LOCAL_EXPERTS: dict[str, Any] = {"intermediate_size": 128, "num_local_experts": NUM_EXPERTS}
_ROUTED: dict[str, Any] = {
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
_DEEPSEEK_V3: dict[str, Any] = {
    **_ROUTED,
    **_LATENT_ATTENTION,
    "n_group": 2,
    "routed_scaling_factor": 1.0,
    # transformers assumes these two; vLLM reads them, as in DeepSeek's own config.json.
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_LINEAR_ATTENTION: dict[str, Any] = {
    **_SOME_HEADS,
    **_FEW_EXPERTS,
    "intermediate_size": 256,
    "shared_expert_intermediate_size": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,  # vLLM's kernel for CPUs takes no fewer than 64
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
}
_VISION: dict[str, Any] = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
    },
    "tie_word_embeddings": False,
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}
_LLAMA4: dict[str, Any] = {
    **_SOME_HEADS,
    **_FEW_LOCAL_EXPERTS,
    "intermediate_size_mlp": 256,
    "num_experts_per_tok": 1,
    "use_qk_norm": False,
}
_GLM5: dict[str, Any] = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 0,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "index_topk": 32,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "linear_head_dim": 32,
    "linear_num_heads": 4,
    "hc_mult": 2,
    "swiglu_limit": 1.0,  # so low that it matters
    "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["linear_attention", "indexed_attention"],
}
_MINIMAX_M3: dict[str, Any] = {
    **_SOME_HEADS,
    **_FEW_LOCAL_EXPERTS,
    "dense_intermediate_size": 256,
    "shared_intermediate_size": 128,
    "rotary_dim": 16,
    "swiglu_limit": 1.0,
    "rope_parameters": {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "partial_rotary_factor": 0.5,
    },
    "index_n_heads": 2,
    "index_head_dim": 32,
    "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["full_attention", "minimax_m3_sparse"],
}
_GEMMA4: dict[str, Any] = {
    **_SOME_HEADS,
    **_FEW_EXPERTS,
    "global_head_dim": 32,
    "intermediate_size": 256,
    "enable_moe_block": True,
    "top_k_experts": 2,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_key_value_heads": 2, **_FEW_LOCAL_EXPERTS, "intermediate_size": 256},
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        **_FEW_EXPERTS,
        "moe_intermediate_size": 176,  # no group size divides it
    },
    "qwen3_moe": {**_SOME_HEADS, **_FEW_EXPERTS, "intermediate_size": 256, "norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4, **_FEW_EXPERTS, "intermediate_size": 128},
    # As DeepSeek-V2-Lite: softmax routing without expert groups.
    "deepseek_v2": {
        **_DEEPSEEK_V3,
        "n_group": 1,
        "q_lora_rank": None,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy",
    },
    "deepseek_v3": _DEEPSEEK_V3,
    "glm4_moe": {**_SOME_HEADS, **_ROUTED},
    "minimax_m2": {
        **_SOME_HEADS,
        **_FEW_LOCAL_EXPERTS,
        # Only vLLM reads these, as in MiniMax's own config.json.
        "rotary_dim": 32,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
    "phimoe": {
        "num_key_value_heads": 2,
        **_FEW_LOCAL_EXPERTS,
        "sliding_window": None,
        # As released; vLLM has these biases whatever is written here.
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "qwen3_next": _LINEAR_ATTENTION,
    "qwen3_5_moe_text": _LINEAR_ATTENTION,
    "flex_olmo": {"num_key_value_heads": 2, **_FEW_EXPERTS, "intermediate_size": 128},
    "deepseek_v32": _DEEPSEEK_V3,
    "glm4_moe_lite": {**_ROUTED, **_LATENT_ATTENTION},
    "dots1": {**_SOME_HEADS, **_ROUTED, "layer_types": ["full_attention"] * 2},
    "ernie4_5_moe": {
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "mimo_v2_flash": {**_SOME_HEADS, **_ROUTED, "v_head_dim": 32},
    "hunyuan_v1_moe": {
        **_SOME_HEADS, **_FEW_EXPERTS, "intermediate_size": 128, "moe_topk": 2,
    },
    "lfm2_moe": {
        "tie_word_embeddings": True,  # as released, and as vLLM has it whatever is written here
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        **_FEW_EXPERTS,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "granitemoe": {
        "num_key_value_heads": 2,
        **_FEW_LOCAL_EXPERTS,
        # Granite's own numbers are not 1 either.
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 0.5,
        "attention_multiplier": 0.2,
    },
    "granitemoeshared": {
        "num_key_value_heads": 2, **_FEW_LOCAL_EXPERTS, "shared_intermediate_size": 128,
    },
    "gpt_oss": {
        **_SOME_HEADS,
        **_FEW_LOCAL_EXPERTS,
        "intermediate_size": 192,
        "sliding_window": 64,
    },
    "llama4_text": _LLAMA4,
    "gemma4_text": _GEMMA4,
    "nemotron_h": {
        **_SOME_HEADS,
        **_ROUTED,
        "moe_shared_expert_intermediate_size": 128,
        "layers_block_type": ["attention", "moe"],
    },
    "glm_moe_dsa": {
        **_ROUTED,
        **_LATENT_ATTENTION,
        "mlp_layer_types": ["dense", "sparse"],
        "indexer_types": ["full", "shared"],
    },
    "deepseek_v4": {
        **_FEW_EXPERTS,
        "n_routed_experts": NUM_EXPERTS,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "q_lora_rank": 64,
        "o_lora_rank": 32,
        "o_groups": 2,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 16,
        "num_nextn_predict_layers": 0,
        "hc_mult": 2,
        "swiglu_limit": 1.0,
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "kimi_k2": _DEEPSEEK_V3,
    "glm5_next": {
        "text_config": _COMMON | _GLM5,
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "projection_intermediate_size": 64,
            "image_size": 28,
        },
        "tie_word_embeddings": False,
    },
    "minimax_m3_vl": {
        "text_config": _COMMON | _MINIMAX_M3,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
        },
        "projector_hidden_size": 64,
        "tie_word_embeddings": False,
    },
    "llama4": {
        "text_config": _COMMON | _LLAMA4,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "vision_output_dim": 32,
            "image_size": 28,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        "tie_word_embeddings": False,
    },
    "gemma4": {
        "text_config": _COMMON | _GEMMA4,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 1,
            "head_dim": 16,
            "global_head_dim": 16,
        },
        "audio_config": None,
        # In the vocabulary; taken for padding, which text has none of.
        **dict.fromkeys(("image_token_id", "video_token_id", "audio_token_id"), 2),
        "tie_word_embeddings": False,
    },
    "qwen3_5_moe": {"text_config": _COMMON | _LINEAR_ATTENTION, **_VISION},
    "qwen3_vl_moe": {
        "text_config": {
            **_COMMON,
            **_SOME_HEADS,
            **_FEW_EXPERTS,
            "intermediate_size": 256,
            "norm_topk_prob": True,  # transformers assumes it; vLLM reads it
        },
        **_VISION,
    },
}  # fmt: skip
"""What distinguishes each family's configuration, by ``model_type``."""
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "switch_transformers": {
        "vocab_size": VOCABULARY,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 176,  # no group size divides it
        "num_heads": 4,
        # Experts in layers 1 and 3 of the encoder, and in layer 1 of the decoder.
        "num_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "num_experts": NUM_EXPERTS,
        "expert_capacity": 5,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "decoder_start_token_id": 2,
    },
}
"""The same of families with an encoder, which vLLM does not have."""
WITHOUT_A_ROW: dict[str, dict[str, Any]] = {
    "afmoe": {
        **_SOME_HEADS,
        **_FEW_EXPERTS,
        "intermediate_size": 256,
        "num_dense_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "axk1": {**_ROUTED, **_LATENT_ATTENTION},
    "cohere2_moe": {
        **_SOME_HEADS,
        **_FEW_EXPERTS,
        "intermediate_size": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "exaone_moe": {
        **_SOME_HEADS,
        **_ROUTED,
        "num_experts": NUM_EXPERTS,
        "layer_types": ["full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "granitemoehybrid": {
        "num_key_value_heads": 2,
        **_FEW_LOCAL_EXPERTS,
        "shared_intermediate_size": 128,
        "layer_types": ["attention", "attention"],
        "mamba_expand": 1,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
    },
    "hy_v3": {
        **_SOME_HEADS, **_FEW_EXPERTS, "intermediate_size": 256, "first_k_dense_replace": 1,
    },
    "jamba": {
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "num_experts": NUM_EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "kimi_linear": {
        **_SOME_HEADS,
        **_ROUTED,
        **_LATENT_ATTENTION,
        "num_experts": NUM_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "laguna": {
        **_SOME_HEADS,
        **_FEW_EXPERTS,
        "intermediate_size": 256,
        "shared_expert_intermediate_size": 128,
        "layer_types": ["full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "mellum": {**_SOME_HEADS, **_FEW_EXPERTS, "layer_types": ["full_attention"] * 2},
    "minimax": {
        **_SOME_HEADS,
        **_FEW_LOCAL_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 16,
    },
    "solar_open": {**_SOME_HEADS, **_ROUTED},
}  # fmt: skip
"""The same of models that are read as transformers describes them."""
_IMPLEMENTED_AS = {"kimi_k2": "deepseek_v3"}
_RELEASED_WITH: dict[str, dict[str, Any]] = {
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
    # What vLLM reads instead of layer_types, mlp_layer_types, rms_norm_eps and rope_parameters.
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "layernorm_epsilon": 1e-5,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
        "sliding_window_size": 128,
        "add_swa_attention_sink_bias": True,
        "rope_theta": 5e6,
        "swa_rope_theta": 1e4,
        "partial_rotary_factor": 0.334,
    },
    "kimi_k2": {
        "model_type": "kimi_k2",
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
    },
}
"""What releases say in config.json, where transformers writes something else."""


UNKNOWN_TO_TRANSFORMERS = {"kimi_k2"}
NOT_ON_CPU = {
    "switch_transformers": "vLLM does not have it",
    "minimax_m2": "its router takes sigmoid scores of DeepSeek's expert groups only",
    "deepseek_v32": "no sparse attention",
    "glm_moe_dsa": "no sparse attention",
    "nemotron_h": "no experts without a gate",
    "deepseek_v4": "reads a configuration that transformers does not write",
    **dict.fromkeys(("minimax_m3_vl", "glm5_next"), "no sparse attention"),
}
"""Why vLLM 0.32 cannot run a family on CPUs, quantized or not; for all the tests here know."""
DIFFERENT_IN_VLLM = {"ernie4_5_moe"}
"""Families whose answers on CPUs are not those of transformers, quantized or not: the reference is
vLLM itself with the dequantized model."""
BFLOAT16_IN_VLLM = {"qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"}
"""Families whose linear attention vLLM runs in bfloat16 only on CPUs."""
NEED_TORCHVISION = {"llama4", "gemma4", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe"}
"""Families whose classes in vLLM need a torchvision that fits torch."""
RENAMED_IN_MEMORY = {"deepseek_v4", "glm5_next", "minimax_m3_vl"}
"""Families of which transformers has more in memory under other names, or fused, than experts."""
NOT_LAYERWISE = dict.fromkeys(("deepseek_v4", "glm5_next"), "several residual streams")
"""Why the layers of a family cannot be run one by one."""
KNOWN = [family for family in FAMILIES if family not in UNKNOWN_TO_TRANSFORMERS]


def as_released(name: str) -> str:
    """Rename a tensor of MiniMax-M3, whose dense layers transformers saves as if they had experts.

    Other families have no such names.
    """
    return re.sub(r"\bblock_sparse_moe\.(?=(gate_proj|up_proj|down_proj|fc[12])\.)", "mlp.", name)


def load_model(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Load a checkpoint with all its parts into transformers."""
    stated = json.loads((folder / "config.json").read_text())
    if stated["model_type"] in UNKNOWN_TO_TRANSFORMERS:
        with TemporaryDirectory() as known:
            shutil.copytree(folder, known, dirs_exist_ok=True)
            del stated["auto_map"]
            stated["model_type"] = _IMPLEMENTED_AS[stated["model_type"]]
            (Path(known) / "config.json").write_text(json.dumps(stated))
            return load_model(Path(known), dtype, **options)
    auto = _auto_class(AutoConfig.from_pretrained(folder))
    return auto.from_pretrained(folder, dtype=dtype, **options)


def _auto_class(config: Any) -> Any:
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def decoder_layers(model: Any) -> Any:
    """Return the decoder layers of a model in transformers."""
    decoder = model.get_decoder()
    return (decoder if hasattr(decoder, "layers") else decoder.model).layers


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


def make_config(family: str) -> Any:
    """Return the configuration of a tiny model of a family, in transformers."""
    if family in ENCODER_DECODERS:
        return AutoConfig.for_model(family, **ENCODER_DECODERS[family])
    options = (FAMILIES | WITHOUT_A_ROW)[family]
    return AutoConfig.for_model(
        _IMPLEMENTED_AS.get(family, family),
        **options if "text_config" in options else _COMMON | options,
    )


def make_model(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a tiny random checkpoint of a family; the same one every time."""
    torch.manual_seed(0)
    config = make_config(family)
    model = _auto_class(config).from_config(config, dtype=torch.float32).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(parameter, std=0.05)
        # Zeros as transformers makes them. vLLM adds no bias of an output head, so that stays so.
        elif name.endswith("proj_bias") or (family == "phimoe" and name.endswith("proj.bias")):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text()) | _RELEASED_WITH.get(family, {})
    path.write_text(json.dumps(written))
    save_tokenizer(folder)
    return folder


def add_prediction_layer(model: Path, folder: Path, prefix: str) -> Path:
    """Write a copy of a checkpoint with a layer for multi-token prediction.

    Args:
        model: Checkpoint of two layers in one file.
        folder: The copy.
        prefix: Of the new layer's tensors: in ``mtp`` as Qwen3-Next has it, else as DeepSeek-V3.
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
    if prefix.startswith("mtp."):
        tensors["mtp.fc.weight"] = projection.bfloat16()
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            tensors[f"mtp.{name}.weight"] = torch.zeros(hidden).bfloat16()  # 1 is added to them
    else:
        tensors[f"{prefix}eh_proj.weight"] = projection.bfloat16()
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(hidden).bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return folder
