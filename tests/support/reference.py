"""Readers of the format that share no code with the product: plain numpy, bit by bit."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

_PACKED = re.compile(r"(.*)\.weight_packed")


def unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpack uint8 [N, B] into codes [N, 8 * B / bits], least significant bit first."""
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    powers = 1 << np.arange(bits)
    return (stream.reshape(len(packed), -1, bits) * powers).sum(-1)


def dequantize(
    packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Return the float64 weights [N, K] of one stored matrix; its width follows from its size."""
    rows, groups = scale.shape
    bits = packed.shape[1] * 8 // (groups * group_size)
    codes = unpack_bits(packed.numpy(), bits).reshape(rows, groups, group_size)
    centred = codes - zero_point.numpy()[..., None] * 2.0**bits / 256
    weight = centred * scale.numpy().astype(np.float64)[..., None]
    return torch.from_numpy(weight.reshape(rows, -1))


def dequantize_checkpoint(packed: Path, target: Path) -> Path:
    """Write a packed checkpoint as an ordinary float32 one."""
    target.mkdir()
    config = json.loads((packed / "config.json").read_text())
    quantization = config.pop("quantization_config")
    config["dtype"] = "float32"
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(packed.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            stored = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        for name, tensor in stored.items():
            match = _PACKED.fullmatch(name)
            if match:
                stem = match[1]
                tensors[f"{stem}.weight"] = dequantize(
                    tensor,
                    stored[f"{stem}.weight_scale"],
                    stored[f"{stem}.weight_zero_point"],
                    quantization["group_size"],
                ).float()
            elif not name.endswith((".weight_scale", ".weight_zero_point")):
                tensors[name] = tensor.float()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    for path in packed.glob("*token*"):
        shutil.copy(path, target)
    return target
