"""What vLLM can serve of a model, as far as ``config.json`` and names of tensors tell."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from moeq.checkpoint.families import family_of
from moeq.errors import MoeqError

DECODER_LAYER = re.compile(r"(?:(?:model|backbone|language_model)\.)*layers\.(\d+)\.")
"""Matches the start of a decoder layer's tensors; those of vision and audio are elsewhere."""
_ACTIVATIONS = ("mlp_hidden_act", "hidden_activation", "hidden_act", "dense_act_fn")
"""Where ``config.json`` tells the activation of experts; the first that is there holds."""
_NAMED_IN_VLLM = {"swish": "silu"}
"""Other names that transformers has for an activation, of which vLLM's models know one only."""
_SAVED_OTHERWISE = {"minimax_m3_vl": {"silu": "swigluoai"}}
"""What transformers writes as the activation of a model, and what vLLM's model asks for."""
PREDICT_AFTER_LAYERS = {
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa",
    "kimi_k2", "glm5_next", "hy_v3",
}  # fmt: skip
"""Models whose prediction layers vLLM finds after their own layers."""
_PREDICT_IN_MTP = {
    "deepseek_v4", "ernie4_5_moe", "exaone_moe", "mimo_v2_flash", "minimax_m3_vl", "nemotron_h",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next",
}  # fmt: skip
"""Models whose prediction layers vLLM finds under the name ``mtp``."""
_TAKEN_FOR_GRANTED: dict[str, dict[str, Any]] = {
    "gpt_oss": {"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    "lfm2_moe": {"tie_word_embeddings": True, "tie_embedding": True},
    "olmoe": {"norm_topk_prob": False, "clip_qkv": None},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
}
"""What vLLM computes with whatever ``config.json`` says, by ``model_type``.

Where ``config.json`` says nothing, transformers takes the same, but for biases: there are none.
"""
_NOT_ADDED = {"phimoe": "lm_head.bias"}
"""A bias that vLLM loads and never adds, by ``model_type``."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of ``config.json`` that describes the language model."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def _activation_key(text: Mapping[str, Any]) -> str | None:
    return next((key for key in _ACTIVATIONS if text.get(key) is not None), None)


def _served_activation(name: object) -> object:
    return _NAMED_IN_VLLM.get(str(name), name)


def served_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` with the activation of experts under the name that vLLM knows."""
    text = dict(text_config(config))
    key = _activation_key(text)
    if key is not None:
        names = _SAVED_OTHERWISE.get(str(config.get("model_type")), {})
        text[key] = names.get(str(text[key]), _served_activation(text[key]))
    return text if text_config(config) is config else {**config, "text_config": text}


def drafts_tokens(config: Mapping[str, Any], block: str, index: int) -> bool:
    """Say whether a decoder layer is one for multi-token prediction, which stays as it is.

    Such layers are under a name of their own, or come after the model's own layers.

    Args:
        config: ``config.json``.
        block: Path of the layer.
        index: Its number in there.
    """
    layers = text_config(config).get("num_hidden_layers")
    return "mtp" in block.split(".") or (isinstance(layers, int) and index >= layers)


def linear_attention_layers(config: Mapping[str, Any]) -> set[int]:
    """Return the numbers of the decoder layers whose attention is linear.

    Releases say it in their own ways: transformers by ``layer_types``, MiniMax by a list with 0 for
    linear, Kimi by numbers that count from 1.
    """
    text = text_config(config)
    kimi = text.get("linear_attn_config")
    types, zeros, numbers = (
        value if isinstance(value, list) else []
        for value in (
            text.get("layer_types"),
            text.get("attn_type_list"),
            kimi.get("kda_layers") if isinstance(kimi, Mapping) else None,
        )
    )
    return {
        *(index for index, kind in enumerate(types) if kind == "linear_attention"),
        *(index for index, kind in enumerate(zeros) if kind == 0),
        *(number - 1 for number in numbers if isinstance(number, int)),
    }


def is_left_out(config: Mapping[str, Any], name: str) -> bool:
    """Say whether a tensor is one of a prediction layer that vLLM's class of the model refuses.

    It takes part in no answer: without speculation vLLM passes over such layers where it knows
    them, and does not start where it does not.
    """
    model_type = config.get("model_type")
    if "mtp" in name.split("."):
        return model_type not in _PREDICT_IN_MTP
    match = DECODER_LAYER.match(name)
    return (
        match is not None
        and drafts_tokens(config, name, int(match[1]))
        and model_type not in PREDICT_AFTER_LAYERS
    )


def not_added(config: Mapping[str, Any]) -> str | None:
    """Return the bias that a model has and vLLM does not add, if there is one."""
    return _NOT_ADDED.get(str(config.get("model_type")))


def check_servable(config: Mapping[str, Any], folder: object, names: Iterable[str]) -> None:
    """Check what vLLM or the kernels would compute otherwise, or refuse only when they load.

    Args:
        config: ``config.json`` of a supported model.
        folder: Where it lies, for messages.
        names: Of all tensors in the checkpoint.

    Raises:
        MoeqError: The model cannot be served as it was trained; says what stands against it.
    """
    text, family = text_config(config), family_of(config)
    key = _activation_key(text)
    if key is not None and _served_activation(text[key]) not in family.activations:
        raise MoeqError(
            f"{folder}: config.json has {key} {text[key]!r}, but experts of {config['model_type']} "
            f"are {'read' if family.derived else 'served'} with {' or '.join(family.activations)} "
            f"only{', without a row in families.py' if family.derived else ''}"
        )
    model_type = str(config.get("model_type"))
    for key, value in _TAKEN_FOR_GRANTED.get(model_type, {}).items():
        stated = text.get(key, False if key.endswith("_bias") else value)
        if stated != value:
            raise MoeqError(
                f"{folder}: config.json has {key} {stated!r}, but vLLM runs {model_type} with "
                f"{value!r} only"
            )
    if text.get("moe_latent_size"):
        raise MoeqError(
            f"{folder}: config.json has moe_latent_size {text['moe_latent_size']}: experts between "
            "two projections of their layer, which make their inputs smaller, are not supported"
        )
    layers, more = text.get("num_hidden_layers"), text.get("num_nextn_predict_layers") or 0
    if not isinstance(more, int):
        raise MoeqError(f"{folder}: config.json has num_nextn_predict_layers {more!r}, no number")
    for name in names:
        match = DECODER_LAYER.match(name)
        if match and isinstance(layers, int) and int(match[1]) >= layers + more:
            raise MoeqError(
                f"{folder}: {name} is of no layer of the model: config.json has num_hidden_layers "
                f"{layers} and num_nextn_predict_layers {more}. Correct it, or remove the tensors"
            )
