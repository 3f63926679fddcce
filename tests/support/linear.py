"""Random dense layers at 4 and 8 bits, and checkpoints with some."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.experts import random_matrix
from support.reference import dequantize
from vllm_moeq.format import LINEAR_WIDTHS, pack, to_compressed_tensors, write_manifest
from vllm_moeq.kernels import KERNELS, LinearLayout, LinearWeight, packed_linear, select_kernel

MIDDLE = 128
"""Zero point of a symmetric grid: half of the code range."""


@dataclass(frozen=True)
class DenseLayer:
    """What a kernel takes, and the same weight [N, K] in float64."""

    layout: LinearLayout
    weight: LinearWeight
    float64: torch.Tensor

    def run(self, kernel: str, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Prepare the layer for a row of the dispatch table and run the op."""
        weight, layout = self.prepared(kernel)
        result: torch.Tensor = packed_linear(x, *weight, bias, layout, self.layout.rows)
        return result

    def prepared(self, kernel: str) -> tuple[LinearWeight, torch.Tensor]:
        """Return weight and layout as the op takes them."""
        index = select_kernel(torch.device("cpu"), kernel)
        layout = self.layout._replace(kernel=index)
        return KERNELS[index].prepare_linear(self.weight, layout), layout.to_tensor()


def random_layer(
    rows: int, columns: int, bits: int, group_size: int = 64, seed: int = 0
) -> DenseLayer:
    """Return a random dense layer, its scales in bfloat16 as on disk."""
    packed, scale, zero = random_matrix(rows, columns, bits, group_size, seed)
    scale = scale.bfloat16()
    assert torch.equal(scale.half().bfloat16(), scale)
    return DenseLayer(
        LinearLayout(bits, group_size, rows, columns),
        LinearWeight(packed.view(torch.int32), scale),
        dequantize(packed, scale.half(), torch.full_like(zero, MIDDLE), group_size),
    )


MIXED = {
    r".*layers\.0\.self_attn\.[qkv]_proj": 4,
    r".*layers\.1\.self_attn\.[qkv]_proj": 8,
    r".*layers\.0\.self_attn\.o_proj": 8,
    r".*layers\.1\.self_attn\.o_proj": 4,
    r".*self_attn\.(q_a_proj|kv_a_proj_with_mqa)": 4,
    r".*self_attn\.q_b_proj": 8,
    r".*layers\.\d+\.mlp\.(gate|up)_proj|.*shared_experts?\.(gate|up)_proj": 4,
    r".*layers\.\d+\.mlp\.down_proj|.*shared_experts?\.down_proj": 8,
    r".*shared_mlp\.(input|output)_linear": 4,
    r".*self_attn\.out_proj|.*feed_forward\.w2": 8,
    r".*feed_forward\.w[13]": 4,
    "lm_head": 4,
    r"(.*\.)?embed_tokens": 8,
}
"""Patterns of layers, of any family, to widths: both for rows and for columns that ranks share."""
EMBEDDINGS = ("lm_head", "embed_tokens")
TIED = ("lfm2_moe", "gemma4", "gemma4_text")
"""Families whose output head is the embeddings: vLLM ties it always, or all releases do."""
PLAIN_INPUT = ("gpt_oss",)
"""Families whose packed embeddings vLLM 0.32 would not find."""


def pack_linear(folder: Path, widths: Mapping[str, int] = MIXED) -> Path:
    """Round dense layers of a packed checkpoint to nearest, in place.

    Layers for multi-token prediction, and of vision, stay as they are.

    Args:
        folder: With one weight file.
        widths: Patterns of module names to widths.
    """
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    group_size = quantization["group_size"]
    # Nemotron-H has no such number, and no layers that draft tokens.
    hidden_layers = config.get("text_config", config).get("num_hidden_layers", math.inf)
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors, linear_bits = load_file(file), {}
    shared = config["model_type"] in TIED or "lm_head.weight" not in tensors
    for name in sorted(tensors):
        module, _, kind = name.rpartition(".")
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if kind != "weight" or "vision" in name or (layer and int(layer[1]) >= hidden_layers):
            continue
        bits = next((bits for key, bits in widths.items() if re.fullmatch(key, module)), None)
        kind_of_layer = module.rpartition(".")[2]
        if kind_of_layer in EMBEDDINGS and shared:
            continue
        if kind_of_layer == "embed_tokens" and config["model_type"] in PLAIN_INPUT:
            continue
        if bits is not None and tensors[name].shape[-1] % group_size == 0:
            linear_bits[module] = bits
            for suffix, tensor in _rounded(tensors.pop(name), bits, group_size).items():
                tensors[f"{module}.{suffix}"] = tensor
    assert set(linear_bits.values()) <= set(LINEAR_WIDTHS), "no such layers"
    save_file(tensors, file, metadata=metadata)
    quantization["linear"] = to_compressed_tensors(linear_bits, group_size)
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder)
    return folder


def _rounded(weight: torch.Tensor, bits: int, group_size: int) -> dict[str, torch.Tensor]:
    groups = weight.float().unflatten(1, (-1, group_size))
    half = 2 ** (bits - 1)
    scale = (groups.abs().amax(-1) / half).clamp(min=2**-14).bfloat16()
    codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-half, half - 1) + half
    return {
        "weight_packed": pack(codes.flatten(1).to(torch.uint8), bits).view(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
