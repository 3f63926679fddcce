"""The models of ``cpu_serving.py``: OLMoE's shape with random weights, and what is packed of it."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from serving_figures import BF16, BITS, KV_CACHE_GIB, PACKED
from transformers import OlmoeConfig

from moeq.checkpoint.reader import INDEX_NAME

Shapes = dict[str, tuple[int, ...]]

RUNTIME_BYTES = 3 << 30
"""More than vLLM takes beyond weights and KV cache: about 1.6 GB, and a layer while it loads."""
DISK_FACTOR = 1.7
"""Bytes on disk of all variants, relative to bf16."""


def tensor_shapes(config: OlmoeConfig) -> list[Shapes]:
    """Return the tensors of every layer, then those outside the layers, by their names on disk."""
    hidden, inner = config.hidden_size, config.intermediate_size
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    shapes: Shapes = {name: (hidden,) for name in norms}
    shapes |= {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes["mlp.gate"] = (config.num_experts, hidden)
    for expert in range(config.num_experts):
        shapes |= {f"mlp.experts.{expert}.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, inner)
    embedding = (config.vocab_size, hidden)
    outer = {"model.embed_tokens": embedding, "model.norm": (hidden,), "lm_head": embedding}
    parts = [
        {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
        for layer in range(config.num_hidden_layers)
    ]
    return [{f"{name}.weight": shape for name, shape in p.items()} for p in (*parts, outer)]


def fitting_layers(config: OlmoeConfig, work: Path) -> int:
    """Return how many layers of the model fit into the free memory and the free disk."""
    layer, *_, outer = (2 * sum(map(math.prod, part.values())) for part in tensor_shapes(config))
    memory = psutil.virtual_memory().available - (KV_CACHE_GIB << 30) - RUNTIME_BYTES
    made = sum(path.stat().st_size for path in work.rglob("*.safetensors"))
    disk = (shutil.disk_usage(work).free + made) / DISK_FACTOR
    fitting = int((min(memory, disk) - outer) // layer)
    return max(1, min(config.num_hidden_layers, fitting))


def make_model(config: OlmoeConfig, folder: Path) -> None:
    """Write a checkpoint of random weights, one layer at a time; config.json comes last."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    parts = tensor_shapes(config)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        for tensor in tensors.values():
            if tensor.dim() == 2:  # norms stay one
                tensor.normal_(0, config.initializer_range, generator=generator)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)


def make_variants(config: OlmoeConfig, work: Path, dense_bits: list[str]) -> dict[str, Path]:
    """Make the bf16 model and quantize it once for each width, unless ``work`` has them.

    Args:
        config: Of the model.
        work: Folder of all.
        dense_bits: Widths of dense layers; ``4e`` and ``8e`` also of the embeddings.
    """
    name = f"{config.num_hidden_layers}x{config.num_experts}x{config.hidden_size}"
    source = work / f"{name}-{BF16}"
    if not (source / "config.json").exists():
        print(f"== making {source}", flush=True)
        make_model(config, source)
    folders = {BF16: source}
    for dense in ["16", *dense_bits]:
        bits = dense.removesuffix("e")
        variant = PACKED if dense == "16" else f"{PACKED}, dense {bits}"
        variant += ", embeddings too" if dense != bits else ""
        folders[variant] = folder = work / f"{name}-{PACKED}-{dense}"
        if not folder.exists():
            plan = ["--bits", BITS, "--strategy", "random:0", "--dense-bits", bits]
            plan += ["--quantize-embeddings"] if dense != bits else []
            rounding = ["--calib", "none", "--method", "rtn"]  # speed has nothing to do with it
            subprocess.run(["moeq", "quantize", source, "-o", folder, *plan, *rounding], check=True)
    return folders
