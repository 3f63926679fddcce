"""The same weights as releases store them: FP8 with scales, or compressed-tensors' integers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Lowered = tuple[Tensors, torch.Tensor]
"""What is stored for a weight, by suffix, and the bfloat16 weight that it stands for."""


def load(folder: Path) -> Tensors:
    """Return all tensors of a checkpoint."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def rewrite(source: Path, folder: Path, tensors: Tensors, **config: Any) -> Path:
    """Write a copy of a checkpoint with other tensors and some other keys of ``config.json``."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def block_fp8(weight: torch.Tensor) -> Lowered:
    """Scale blocks of 128 x 128, as DeepSeek does."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.empty(rows, columns)
    stored, twin = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for r in range(rows):
        for c in range(columns):
            block = slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128)
            scale[r, c] = weight[block].float().abs().max() / 448
            stored[block] = (weight[block].float() / scale[r, c]).to(torch.float8_e4m3fn)
            twin[block] = (stored[block].float() * scale[r, c]).bfloat16()
    return {"weight": stored, "weight_scale_inv": scale}, twin


def channel_fp8(weight: torch.Tensor) -> Lowered:
    """Scale rows, as compressed-tensors does; a scale has 16 bits."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    stored = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, (stored.float() * scale.float()).bfloat16()


def tensor_fp8(weight: torch.Tensor) -> Lowered:
    """Scale the matrix as a whole, with a scale of its inputs beside."""
    scale = weight.float().abs().max() / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": stored, "weight_scale": scale, "input_scale": torch.tensor(1.0)}
    return tensors, (stored.float() * scale).bfloat16()


def int4(weight: torch.Tensor, symmetric: bool = True, group: int = 32) -> Lowered:
    """Pack groups of a row with compressed-tensors' own function."""
    groups = weight.float().view(len(weight), -1, group)
    scale = (groups.abs().amax(2) / 7).bfloat16()
    zero = torch.zeros(scale.shape) if symmetric else torch.randint(-8, 8, scale.shape)
    codes = (groups / scale.float().unsqueeze(2)).round() + zero.unsqueeze(2)
    codes = codes.clamp(-8, 7)
    twin = ((codes - zero.unsqueeze(2)) * scale.float().unsqueeze(2)).flatten(1).bfloat16()
    tensors = {
        "weight_packed": pack_to_int32(codes.flatten(1).to(torch.int8), 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_to_int32(zero.to(torch.int8), 4, packed_dim=0)
    return tensors, twin


def asymmetric_int4(weight: torch.Tensor) -> Lowered:
    """Pack groups of a row with zero points."""
    return int4(weight, symmetric=False)


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


LOWERED: dict[str, tuple[Callable[[torch.Tensor], Lowered], dict[str, Any]]] = {
    "fp8 blocks": (block_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8 tensor": (tensor_fp8, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8 channel": (channel_fp8, _compressed("float-quantized", num_bits=8, type="float")),
    "int4": (int4, _compressed("pack-quantized", num_bits=4, type="int")),
    "int4 zero points": (asymmetric_int4, _compressed("pack-quantized", num_bits=4, type="int")),
}
"""By name: what lowers a weight, and the ``quantization_config`` that says so."""


def lowered_and_twin(source: Path, folder: Path, kind: str) -> tuple[Path, Path]:
    """Write a model with its linear layers in lower precision, and the same in bfloat16."""
    torch.manual_seed(0)
    lower, config = LOWERED[kind]
    stored, twin = load(source), load(source)
    for name in [n for n, t in stored.items() if n.endswith("_proj.weight") and t.ndim == 2]:
        tensors, twin[name] = lower(stored.pop(name))
        stored |= {name.removesuffix("weight") + suffix: t for suffix, t in tensors.items()}
    return (
        rewrite(source, folder / "lowered", stored, quantization_config=config),
        rewrite(source, folder / "twin", twin),
    )


_E2M1 = [sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


def mxfp4(weight: torch.Tensor) -> Lowered:
    """Store weights [..., N, K] as OCP's MXFP4, in blocks and scales as gpt-oss has them."""
    groups = weight.double().unflatten(-1, (-1, 32))
    exponent = (groups.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    unit = 2.0 ** exponent.unsqueeze(-1)
    values = torch.tensor(_E2M1, dtype=torch.float64)
    codes = ((groups / unit).unsqueeze(-1) - values).abs().argmin(-1)
    stored = {
        "blocks": (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8),
        "scales": (exponent + 127).to(torch.uint8),
    }
    return stored, (values[codes] * unit).flatten(-2).bfloat16()


def mxfp4_and_twin(source: Path, folder: Path) -> tuple[Path, Path]:
    """Write gpt-oss as it is released, and the same in bfloat16."""
    stored, twin = load(source), load(source)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        tensors, dequantized = mxfp4(stored.pop(name).mT)
        stored |= {f"{name}_{suffix}": tensor for suffix, tensor in tensors.items()}
        twin[name] = dequantized.mT
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return (
        rewrite(source, folder / "lowered", stored, quantization_config=config),
        rewrite(source, folder / "twin", twin),
    )
