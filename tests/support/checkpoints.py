"""Small checkpoints whose every tensor the test chooses, in Mixtral's names on disk."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NUM_LAYERS = 2
NUM_EXPERTS = 4
HIDDEN = 64
INTERMEDIATE = 128
CONTAINERS = tuple(f"model.layers.{i}.block_sparse_moe.experts" for i in range(NUM_LAYERS))
ROUTERS = tuple(f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(NUM_LAYERS))
MATRICES = {
    "w1": (INTERMEDIATE, HIDDEN),
    "w2": (HIDDEN, INTERMEDIATE),
    "w3": (INTERMEDIATE, HIDDEN),
}

Tensors = dict[str, torch.Tensor]


def mixtral_tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Return random tensors of a model with two MoE layers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": random(32, HIDDEN)}
    for container, router in zip(CONTAINERS, ROUTERS, strict=True):
        tensors[router] = random(NUM_EXPERTS, HIDDEN)
        for expert in range(NUM_EXPERTS):
            for matrix, shape in MATRICES.items():
                tensors[f"{container}.{expert}.{matrix}.weight"] = random(*shape)
    return tensors


def write_checkpoint(
    folder: Path, tensors: Tensors | None = None, shards: int = 1, **config: Any
) -> Path:
    """Write tensors (default: :func:`mixtral_tensors`) with a config and, if sharded, an index."""
    tensors = mixtral_tensors() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    routers = [tensor for name, tensor in tensors.items() if name.endswith(".gate.weight")]
    experts = {"num_local_experts": len(routers[0])} if routers else {}
    write_config(folder, **experts | config)
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
    base = {"model_type": "mixtral", "num_local_experts": NUM_EXPERTS, "hidden_size": HIDDEN}
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
