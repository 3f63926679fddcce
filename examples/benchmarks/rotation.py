"""Rotates the residual stream of a Mixtral checkpoint: the same function, other weights.

A random Hadamard rotation spreads outliers over all channels before weights are quantized: Ashkboos
et al., "QuaRot" (2024), section 4. Only the rotation that weights can absorb is done, that of the
residual stream; one inside an expert would have to pass through SwiGLU, which is not linear.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from moeq.checkpoint.reader import CheckpointReader
from moeq.errors import MoeqError

_INTO_ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
_INTO_EXPERTS = ("block_sparse_moe.gate.weight", ".w1.weight", ".w3.weight")
_OUT_OF_BLOCKS = ("o_proj.weight", ".w2.weight")
_HEAD, _EMBEDDING, _LAST_NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"

Tensors = dict[str, torch.Tensor]


def hadamard_rotation(size: int, seed: int) -> torch.Tensor:
    """Return a randomized Hadamard matrix, orthogonal, float64 [size, size].

    Raises:
        MoeqError: ``size`` is no power of two.
    """
    if size & (size - 1):
        raise MoeqError(f"a Hadamard rotation needs a hidden size that is a power of 2, not {size}")
    rotation = torch.ones(1, 1, dtype=torch.float64)
    while len(rotation) < size:
        rotation = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), rotation)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size, 1), generator=generator) * 2 - 1
    return signs * rotation / size**0.5


def rotated(tensors: Tensors, rotation: torch.Tensor) -> Tensors:
    """Return the float64 tensors of a Mixtral whose residual stream is multiplied with a rotation.

    The weights of RMSNorm, which do not commute with a rotation, move into the matrices behind
    them.

    Args:
        tensors: All tensors of the checkpoint, by their names on disk.
        rotation: Orthogonal, float64 [hidden_size, hidden_size].

    Raises:
        MoeqError: The model is no Mixtral, or its output matrix is its embedding; names a tensor.
    """
    if _HEAD not in tensors:
        raise MoeqError(f"{_HEAD} is not in the checkpoint; tied embeddings cannot be rotated")
    result = {}
    for name, tensor in tensors.items():
        weight, layer = tensor.double(), ".".join(name.split(".")[:3])
        if name == _EMBEDDING:
            result[name] = weight @ rotation
        elif name == _LAST_NORM or name.endswith("layernorm.weight"):
            result[name] = torch.ones_like(weight)
        elif name.endswith(_OUT_OF_BLOCKS):
            result[name] = rotation.T @ weight
        else:
            if name == _HEAD:
                norm = _LAST_NORM
            elif name.endswith(_INTO_ATTENTION):
                norm = f"{layer}.input_layernorm.weight"
            elif name.endswith(_INTO_EXPERTS):
                norm = f"{layer}.post_attention_layernorm.weight"
            else:
                raise MoeqError(f"{name} is no tensor of a Mixtral; only those can be rotated")
            result[name] = weight * tensors[norm].double() @ rotation
    return result


def write_rotated(folder: Path, output: Path, seed: int) -> None:
    """Write a checkpoint with its residual stream rotated, its tensors in their old types."""
    reader = CheckpointReader(folder)
    tensors = {name: reader.tensor(name) for name in reader.tensors}
    rotation = hadamard_rotation(reader.config["hidden_size"], seed)
    stored = {
        name: tensor.to(tensors[name].dtype).contiguous()
        for name, tensor in rotated(tensors, rotation).items()
    }
    output.mkdir(parents=True)
    for path in reader.other_files():
        (output / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / path, output / path)
    shutil.copyfile(folder / "config.json", output / "config.json")
    save_file(stored, output / "model.safetensors", metadata={"format": "pt"})
