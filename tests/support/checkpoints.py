"""Small checkpoints whose every tensor the test chooses, in Mixtral's names on disk."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NUM_LAYERS = 2
NUM_EXPERTS = 4
VOCABULARY = 32
HIDDEN = 64
INTERMEDIATE = 128
CONTAINERS = tuple(f"model.layers.{i}.block_sparse_moe.experts" for i in range(NUM_LAYERS))
ROUTERS = tuple(f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(NUM_LAYERS))
MATRICES = {
    "w1": (INTERMEDIATE, HIDDEN),
    "w2": (HIDDEN, INTERMEDIATE),
    "w3": (INTERMEDIATE, HIDDEN),
}
OTHER_WEIGHTS = (
    2 * VOCABULARY * HIDDEN + NUM_LAYERS * 4 * HIDDEN * HIDDEN + (2 * NUM_LAYERS + 1) * HIDDEN
)
"""Of embeddings, head, attention and norms."""

Tensors = dict[str, torch.Tensor]


def mixtral_tensors(
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    experts: int = NUM_EXPERTS,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
) -> Tensors:
    """Return random tensors of a whole model with two MoE layers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    matrices = {
        "w1": (intermediate, hidden), "w2": (hidden, intermediate), "w3": (intermediate, hidden),
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": random(VOCABULARY, hidden)}
    for container, router in zip(CONTAINERS, ROUTERS, strict=True):
        tensors[router] = random(experts, hidden)
        for expert in range(experts):
            for matrix, shape in matrices.items():
                tensors[f"{container}.{expert}.{matrix}.weight"] = random(*shape)
    for layer in range(NUM_LAYERS):
        for projection in "qkvo":
            name = f"model.layers.{layer}.self_attn.{projection}_proj.weight"
            tensors[name] = random(hidden, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden).to(dtype)
    tensors["model.norm.weight"] = torch.ones(hidden).to(dtype)
    tensors["lm_head.weight"] = random(VOCABULARY, hidden)
    return tensors


def write_checkpoint(
    folder: Path, tensors: Tensors | None = None, shards: int = 1, **config: Any
) -> Path:
    """Write tensors (default: :func:`mixtral_tensors`) with a config and, if sharded, an index."""
    tensors = mixtral_tensors() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    routers = [tensor for name, tensor in tensors.items() if name.endswith(".gate.weight")]
    experts = {"num_local_experts": len(routers[0])} if routers else {}
    layers = {int(match[1]) for name in tensors if (match := re.search(r"layers\.(\d+)\.", name))}
    write_config(folder, **{"num_hidden_layers": len(layers)} | experts | config)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = list(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a checkpoint that has one weight file."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def write_config(folder: Path, **config: Any) -> None:
    """Write ``config.json`` of a Mixtral, with some keys replaced."""
    base = {
        "model_type": "mixtral",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_local_experts": NUM_EXPERTS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    (folder / "config.json").write_text(json.dumps(base | config))


def plan_dict(
    widths: Mapping[str, list[int]] | None = None, group_size: int = 64, **changes: Any
) -> dict[str, Any]:
    """Return a plan for :func:`mixtral_tensors` as JSON data, with some keys replaced."""
    widths = widths or dict.fromkeys(CONTAINERS, [3, 2, 2, 1])
    return {
        "format_version": 1,
        "group_size": group_size,
        "expert_bits": {name: {"w13": bits, "w2": bits} for name, bits in widths.items()},
    } | changes
