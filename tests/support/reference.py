"""Readers of the format that share no code with the product: plain numpy, bit by bit."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

_GRANITE = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
FUSED_IN_RELEASES = {
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "gpt_oss": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "llama4_text": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    "gemma4_text": ("experts.gate_up_proj", "experts.down_proj"),
    "llama4": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    "gemma4": ("experts.gate_up_proj", "experts.down_proj"),
    "qwen3_vl_moe": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
}
"""Families without tensors per expert on disk: what holds gate above up, and down, in a layer."""
_PACKED = re.compile(r"(.*)\.weight_packed")
_EXPERT = re.compile(
    r"(?P<layer>.*layers\.\d+\.).*experts\.(?P<expert>\d+)\.(?P<matrix>\w+\.(weight|bias))"
)


def unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpack uint8 [N, B] into codes [N, 8 * B / bits], least significant bit first."""
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    powers = 1 << np.arange(bits)
    return (stream.reshape(len(packed), -1, bits) * powers).sum(-1)


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    group_size: int,
    bits: int | None = None,
) -> torch.Tensor:
    """Return the float64 weights [N, K] of one stored matrix.

    The width of rows in whole groups follows from their size.
    """
    if bits is None:
        bits = packed.shape[1] * 8 // (scale.shape[1] * group_size)
    codes = unpack_bits(packed.numpy(), bits)
    group = np.arange(codes.shape[1]) // group_size  # of each column
    assert group[-1] + 1 == scale.shape[1]
    centred = codes - zero_point.numpy()[:, group] * 2.0**bits / 256
    return torch.from_numpy(centred * scale.numpy().astype(np.float64)[:, group])


def dequantize_checkpoint(packed: Path, target: Path) -> Path:
    """Write a packed checkpoint as an ordinary float32 one."""
    target.mkdir()
    config = json.loads((packed / "config.json").read_text())
    quantization = config.pop("quantization_config")
    for part in (config, config.get("text_config", {})):
        part.pop("transformers_weights", None)
    config["dtype"] = "float32"
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(packed.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            stored = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        for name, tensor in stored.items():
            match = _PACKED.fullmatch(name)
            if match:
                stem = match[1]
                scale = stored[f"{stem}.weight_scale"].half()
                dense = f"{stem}.weight_shape" in stored  # compressed-tensors, symmetric
                tensors[f"{stem}.weight"] = dequantize(
                    tensor.view(torch.uint8),
                    scale,
                    torch.full_like(scale, 128, dtype=torch.uint8)
                    if dense
                    else stored[f"{stem}.weight_zero_point"],
                    quantization["group_size"],
                    None if dense else _width(quantization, stem),
                ).float()
            elif not name.endswith((".weight_scale", ".weight_zero_point", ".weight_shape")):
                tensors[name] = tensor.float()
    tensors = _as_released(tensors, config["model_type"])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    for path in packed.glob("*token*"):
        shutil.copy(path, target)
    return target


def _width(quantization: dict[str, Any], stem: str) -> int:
    """Return the bits that the plan gives to ``container.expert.matrix``."""
    container, expert, matrix = stem.rsplit(".", 2)
    projection = "w2" if matrix in ("w2", "down_proj", "wo") else "w13"
    bits: int = quantization["expert_bits"][container][projection][int(expert)]
    return bits


def _as_released(tensors: dict[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """Fuse or name experts again, where transformers reads them in no other way."""
    if model_type == "switch_transformers":
        return {
            re.sub(r"\.experts\.(\d+)\.", r".experts.expert_\1.", name): tensor
            for name, tensor in tensors.items()
        }
    if model_type not in FUSED_IN_RELEASES:
        return tensors
    released: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, list[torch.Tensor]]] = {}
    for name, tensor in sorted(tensors.items(), key=_expert_number):
        match = _EXPERT.fullmatch(name)
        if match is None:
            released[name] = tensor
        else:
            of_layer = experts.setdefault(match["layer"], {})
            of_layer.setdefault(match["matrix"], []).append(tensor)
    gate_up_name, down_name = FUSED_IN_RELEASES[model_type]
    for layer, matrices in experts.items():
        fused = {kind: torch.stack(parts) for kind, parts in matrices.items()}
        if model_type.startswith("llama4"):  # transposed
            pair = (fused["gate_proj.weight"].mT, fused["up_proj.weight"].mT)
            released[layer + gate_up_name] = torch.cat(pair, 2)
            released[layer + down_name] = fused["down_proj.weight"].mT.contiguous()
        elif model_type == "gpt_oss":  # alternating and transposed, with biases
            pair = (fused["gate_proj.weight"].mT, fused["up_proj.weight"].mT)
            released[layer + gate_up_name] = torch.stack(pair, -1).flatten(2)
            released[layer + down_name] = fused["down_proj.weight"].mT.contiguous()
            biases = (fused["gate_proj.bias"], fused["up_proj.bias"])
            released[f"{layer}{gate_up_name}_bias"] = torch.stack(biases, -1).flatten(1)
            released[f"{layer}{down_name}_bias"] = fused["down_proj.bias"]
        else:
            pair = (fused["gate_proj.weight"], fused["up_proj.weight"])
            released[layer + gate_up_name] = torch.cat(pair, 1)
            released[layer + down_name] = fused["down_proj.weight"]
    return released


def _expert_number(item: tuple[str, torch.Tensor]) -> int:
    match = _EXPERT.fullmatch(item[0])
    return int(match["expert"]) if match else -1
