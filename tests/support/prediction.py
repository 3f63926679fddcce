"""Prediction layers of tiny models, named as vLLM's classes read them."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.models import add_prediction_layer

Named = Iterator[tuple[str, torch.Tensor]]
_HIDDEN = 128
_DENSE = 256


def _of_layer(tensors: dict[str, torch.Tensor], layer: str, prefix: str) -> Named:
    """Yield the tensors of a decoder layer under another prefix."""
    for name in [name for name in tensors if name.startswith(layer)]:
        yield prefix + name.removeprefix(layer), tensors[name].roll(1, 0)


def _norms(*names: str) -> Named:
    yield from ((f"{name}.weight", torch.ones(_HIDDEN).bfloat16()) for name in names)


def _matrix(name: str, rows: int, columns: int) -> tuple[str, torch.Tensor]:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    return f"{name}.weight", (values / 16).bfloat16()


def _joins(prefix: str) -> Named:
    yield _matrix(f"{prefix}eh_proj", _HIDDEN, 2 * _HIDDEN)
    yield from _norms(f"{prefix}enorm", f"{prefix}hnorm")


def _dense_mlp(prefix: str) -> Named:
    yield _matrix(f"{prefix}mlp.gate_proj", _DENSE, _HIDDEN)
    yield _matrix(f"{prefix}mlp.up_proj", _DENSE, _HIDDEN)
    yield _matrix(f"{prefix}mlp.down_proj", _HIDDEN, _DENSE)


def _ernie(tensors: dict[str, torch.Tensor]) -> Named:
    yield from _of_layer(tensors, "model.layers.1.self_attn.", "model.mtp_block.0.self_attn.")
    yield from _norms("model.mtp_block.0.input_layernorm")
    yield from _norms("model.mtp_block.0.post_attention_layernorm")
    yield from _dense_mlp("model.mtp_block.0.")
    yield _matrix("model.mtp_linear_proj.0", _HIDDEN, 2 * _HIDDEN)
    yield from _norms("model.mtp_emb_norm.0", "model.mtp_hidden_norm.0")


def _mimo(tensors: dict[str, torch.Tensor]) -> Named:
    prefix = "model.mtp.layers.0."
    yield from _of_layer(tensors, "model.layers.1.self_attn.", f"{prefix}self_attn.")
    yield from _norms(*(f"{prefix}{n}_layernorm" for n in ("input", "pre_mlp")))
    yield from _norms(f"{prefix}final_layernorm")
    yield from _dense_mlp(prefix)
    yield from _joins(prefix)


def _nemotron(tensors: dict[str, torch.Tensor]) -> Named:
    root = next(name for name in tensors if "layers.0." in name).split("layers.0.")[0]
    yield from _of_layer(tensors, f"{root}layers.0.", "mtp.layers.0.")  # attention
    yield from _joins("mtp.layers.0.")
    yield from _of_layer(tensors, f"{root}layers.1.", "mtp.layers.1.")  # experts
    yield from _norms("mtp.layers.1.final_layernorm")


def _deepseek_v4(tensors: dict[str, torch.Tensor]) -> Named:
    root = next(name for name in tensors if "layers.1." in name).split("layers.1.")[0]
    for name, tensor in _of_layer(tensors, f"{root}layers.1.", "mtp.0."):
        if "compressor" not in name and "indexer" not in name:
            yield name, tensor
    yield from _norms(*(f"mtp.0.{name}" for name in ("enorm", "hnorm", "norm")))
    yield _matrix("mtp.0.e_proj", _HIDDEN, _HIDDEN)
    yield _matrix("mtp.0.h_proj", _HIDDEN, _HIDDEN)
    yield "mtp.0.hc_head_fn", torch.ones(2, 2 * _HIDDEN)
    yield "mtp.0.hc_head_base", torch.ones(2)
    yield "mtp.0.hc_head_scale", torch.ones(1)


OTHERS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Named]]] = {
    "ernie4_5_moe": ("model.mtp_", _ernie),
    "mimo_v2_flash": ("model.mtp.", _mimo),
    "nemotron_h": ("mtp.", _nemotron),
    "deepseek_v4": ("mtp.", _deepseek_v4),
}
"""By family: what all names start with, and what gives the tensors."""
LIKE_LAYERS = {
    "deepseek_v3": "model.layers.2.",
    "glm4_moe": "model.layers.2.",
    "qwen3_next": "mtp.layers.0.",
}
"""By family with prediction layers like its own: the prefix of one."""


def with_prediction(model: Path, folder: Path, family: str) -> tuple[Path, str]:
    """Write a copy of a tiny model with a prediction; return what its names start with, too."""
    if family in LIKE_LAYERS:
        prefix = LIKE_LAYERS[family]
        add_prediction_layer(model, folder, prefix)
        return folder, "mtp." if prefix.startswith("mtp.") else prefix
    shutil.copytree(model, folder)
    start, make = OTHERS[family]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors |= {name: tensor.contiguous() for name, tensor in make(tensors)}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return folder, start


def predicting(folder: Path) -> Path:
    """Change a model so that its prediction is right far more often than chance.

    All layers add little to the residual stream, and the prediction's own starts with the
    embedding of the latest token. So answers depend little on attention and experts, which other
    tests compare: what this is for is whether drafts are accepted.
    """
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if re.search(r"\.(o_proj|out_proj|down_proj)(\.weight)?$", name):
            tensors[name] = tensor / 128
        elif re.search(r"\b(eh_proj|mtp\.fc|mtp_linear_proj\.0)\.weight$", name):
            tensors[name] = torch.eye(_HIDDEN, 2 * _HIDDEN, dtype=tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
