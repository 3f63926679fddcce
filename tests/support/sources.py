"""The same weights as releases store them: FP8 or FP4 with scales, or packed integers."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from moeq.checkpoint import Matrix

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


def expert_tensors(experts: Any, expert: int) -> dict[tuple[Matrix, str], torch.Tensor]:
    """Cut an expert's matrices [outputs, inputs], and biases, out of transformers' own class.

    Args:
        experts: The module that has all experts of a layer.
        expert: Which of them.

    Returns:
        By matrix and kind, ``weight`` or ``bias``.
    """
    gated = getattr(experts, "has_gate", True)
    alternate = not getattr(experts, "is_concatenated", True)
    first = "gate_up_proj" if gated else "up_proj"
    parts: dict[tuple[Matrix, str], torch.Tensor] = {}
    for kind, suffix in {"weight": "", "bias": "_bias"}.items():
        if kind == "bias" and not getattr(experts, "has_bias", False):
            continue
        both, down = (getattr(experts, name + suffix)[expert] for name in (first, "down_proj"))
        # Llama-4's experts do not say that they are transposed.
        if getattr(experts, "is_transposed", "Llama4" in type(experts).__name__):
            both, down = (t.T if kind == "weight" else t for t in (both, down))
        if gated:
            halves = (both[::2], both[1::2]) if alternate else both.chunk(2)
            parts["gate", kind], parts["up", kind] = halves
        else:
            parts["up", kind] = both
        parts["down", kind] = down
    return parts


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


def power_of_two_fp8(weight: torch.Tensor) -> Lowered:
    """Scale blocks of 128 x 128 by powers of two, of which the exponent is stored."""
    exponent = (weight.float().abs().max() / 448).log2().ceil()
    scale = torch.full([-(-size // 128) for size in weight.shape], float(2**exponent))
    stored = (weight.float() / 2**exponent).to(torch.float8_e4m3fn)
    twin = (stored.float() * 2**exponent).bfloat16()
    return {"weight": stored, "scale": scale.to(torch.float8_e8m0fnu)}, twin


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


def int4(weight: torch.Tensor, symmetric: bool = True, group: int = 32, bits: int = 4) -> Lowered:
    """Pack groups of a row with compressed-tensors' own function."""
    half = 1 << (bits - 1)
    groups = weight.float().view(len(weight), -1, group)
    scale = (groups.abs().amax(2) / (half - 1)).bfloat16()
    zero = torch.zeros(scale.shape) if symmetric else torch.randint(-half, half, scale.shape)
    codes = (groups / scale.float().unsqueeze(2)).round() + zero.unsqueeze(2)
    codes = codes.clamp(-half, half - 1)
    twin = ((codes - zero.unsqueeze(2)) * scale.float().unsqueeze(2)).flatten(1).bfloat16()
    tensors = {
        "weight_packed": pack_to_int32(codes.flatten(1).to(torch.int8), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_to_int32(zero.to(torch.int8), bits, packed_dim=0)
    return tensors, twin


def asymmetric_int4(weight: torch.Tensor) -> Lowered:
    """Pack groups of a row with zero points."""
    return int4(weight, symmetric=False)


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


def mxfp4_matrix(weight: torch.Tensor) -> Lowered:
    """Store the same with two weights in an int8 byte, as DeepSeek does."""
    stored, twin = mxfp4(weight)
    codes = stored["blocks"].flatten(-2).view(torch.int8)
    return {"weight": codes, "scale": stored["scales"].view(torch.float8_e8m0fnu)}, twin


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """Return compressed-tensors' ``quantization_config`` of all linear layers but two."""
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


_DEEPSEEK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LOWERED: dict[str, tuple[Callable[[torch.Tensor], Lowered], dict[str, Any]]] = {
    "fp8 blocks": (block_fp8, _DEEPSEEK | {"modules_to_not_convert": ["lm_head"]}),
    "fp8 blocks, powers of two": (power_of_two_fp8, _DEEPSEEK | {"scale_fmt": "ue8m0"}),
    "mxfp4 matrices": (mxfp4_matrix, _DEEPSEEK | {"scale_fmt": "ue8m0"}),
    "fp8 tensor": (tensor_fp8, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8 channel": (channel_fp8, compressed("float-quantized", num_bits=8, type="float")),
    "int4": (int4, compressed("pack-quantized", num_bits=4, type="int")),
    "int4 zero points": (asymmetric_int4, compressed("pack-quantized", num_bits=4, type="int")),
}
INTEGERS: dict[str, tuple[Callable[[torch.Tensor], Lowered], dict[str, Any]]] = {
    f"int{bits} in groups of {group}": (
        partial(int4, group=group, bits=bits),
        compressed("pack-quantized", num_bits=bits, type="int"),
    )
    for bits in (4, 8)
    for group in (32, 64)
}
"""The same, of symmetric integers."""
"""By name: what lowers a weight, and the ``quantization_config`` that says so."""


def lowered_and_twin(source: Path, folder: Path, kind: str) -> tuple[Path, Path]:
    """Write a model with its linear layers in lower precision, and the same in bfloat16."""
    torch.manual_seed(0)
    lower, config = (LOWERED | INTEGERS)[kind]
    stored, twin = load(source), load(source)
    linear = re.compile(r".*(_proj|\.w[123]|\.wq_[ab]|\.wkv|\.wo_[ab])\.weight")
    for name in [n for n, t in stored.items() if linear.fullmatch(n) and t.ndim == 2]:
        tensors, twin[name] = lower(stored.pop(name))
        stored |= {name.removesuffix("weight") + suffix: t for suffix, t in tensors.items()}
    return (
        rewrite(source, folder / "lowered", stored, quantization_config=config),
        rewrite(source, folder / "twin", twin),
    )


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


Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes of all experts' weights, their scales, and the bfloat16 weights that they stand for."""


def _as_transformers(scale_fmt: str) -> Callable[[torch.Tensor], Stored]:
    """Return what transformers does to experts in blocks of 64 x 32, and how it reads them."""

    def lower(weight: torch.Tensor) -> Stored:
        config = FineGrainedFP8Config(weight_block_size=(64, 32), scale_fmt=scale_fmt)
        quantizer = SimpleNamespace(quantization_config=config)
        codes, scales = Fp8Quantize(quantizer).convert({"experts": weight}).values()
        twin = Fp8Dequantize(quantizer)._dequantize_one(codes, scales, torch.bfloat16)
        return codes, scales, twin

    return lower


def _one_scale_for(*sides: int | None) -> Callable[[torch.Tensor], Stored]:
    """Scale parts of each expert's matrix: so many along each side, None for one each."""

    def lower(weight: torch.Tensor) -> Stored:
        rows, columns = (side or size for side, size in zip(sides, weight.shape[1:], strict=True))
        parts = weight.float().unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
        scale = parts.abs().amax((2, 4), keepdim=True) / 448
        codes = (parts / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        twin = (codes.float() * scale).bfloat16()
        return codes.view(weight.shape), scale[:, :, 0, :, 0], twin.view(weight.shape)

    return lower


def _fp4(weight: torch.Tensor) -> Stored:
    stored, twin = mxfp4_matrix(weight)
    return stored["weight"], stored["scale"], twin


FUSED: dict[str, tuple[Callable[[torch.Tensor], Stored], str]] = {
    "blocks": (_as_transformers("float"), "{}_scale_inv"),
    "blocks, powers of two": (_as_transformers("ue8m0"), "{}_weight_scale_inv"),
    "an expert": (_one_scale_for(1, 1), "{}_scale_inv"),
    "gate and up": (_one_scale_for(2, 1), "{}_scale_inv"),
    "rows": (_one_scale_for(None, 1), "{}.weight_scale"),
    "columns": (_one_scale_for(1, None), "{}_weight_scale"),
    "mxfp4": (_fp4, "{}_scale_inv"),
}
"""By what shares a scale: what lowers the experts of a layer, and what their scales are called."""


def fused_and_twin(
    source: Path, folder: Path, kind: str, transposed: bool = False
) -> tuple[Path, Path]:
    """Write a model whose experts are fused in FP8 or FP4, and the same in bfloat16."""
    lower, scale_name = FUSED[kind]
    stored, twin = load(source), load(source)
    for name in [n for n, t in stored.items() if t.ndim == 3 and "experts." in n]:
        weight = stored.pop(name)
        # Rows of different size, so that scales in the wrong place are seen.
        weight = weight * torch.linspace(0.1, 2, weight.shape[1]).bfloat16()[:, None]
        single = "down_proj" in name and kind == "gate and up"
        tensors = (_one_scale_for(1, 1) if single else lower)(weight)
        codes, scales, twin[name] = (t.mT if transposed else t for t in tensors)
        stored[f"{name}.weight" if ".weight" in scale_name else name] = codes
        stored[scale_name.format(name)] = scales
        separator = "." if ".weight" in scale_name else "_"
        stored[f"{name}{separator}activation_scale"] = torch.ones(len(codes))
    block = [32, 64] if transposed else [64, 32]
    config = {"quant_method": "fp8", "weight_block_size": block if "blocks" in kind else None}
    return (
        rewrite(source, folder / "lowered", stored, quantization_config=config),
        rewrite(source, folder / "twin", twin),
    )
