"""Is what is on disk the model that ``config.json`` describes, whole and with the right shapes?

vLLM builds the model of ``config.json`` and fills it with what it finds. What is missing or has
another shape comes to light there only when weights are loaded, hours after the conversion. Here
transformers builds the model without memory, on its meta device, from headers alone.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from packaging.version import Version

from moeq.checkpoint import CheckpointReader, MoELayer
from moeq.checkpoint.families import Family
from moeq.checkpoint.meta import OLDEST, meta_model
from moeq.checkpoint.reader import FLOATS
from moeq.checkpoint.servable import drafts_tokens
from moeq.errors import MoeqError
from moeq.model.architecture import names_on_disk, parts_on_disk, stored_names
from moeq.model.prediction import prediction_problems
from vllm_moeq.format import first_few

logger = logging.getLogger(__name__)

_EXPERTS = re.compile(
    r"\blayers\.(?P<layer>\d+)\.(?:[^.]+\.)?experts\.(?P<tensor>[^.]+)"
    r"|\b(?:encoder|decoder)\.block\.\d+\.layer\.\d+\.mlp\.experts\."
)
"""Matches the parameters of routed experts, which transformers fuses; of T5's kind it does not."""
_ANY_ROOT = ("deepseek_v4",)
"""Models of which vLLM takes names with and without ``model.`` in front."""
_OF_ROTARY = re.compile(r"rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$")
"""Matches what older releases saved; it is computed today, and vLLM leaves it out as well."""


def check_structure(reader: CheckpointReader, layers: Sequence[MoELayer]) -> None:
    """Check a checkpoint before any long work; :func:`structure_problems` with an error.

    Tensors that the model does not have are named in a warning.

    Args:
        reader: As :func:`structure_problems` takes it.
        layers: Likewise.

    Raises:
        MoeqError: Tensors are missing or have other shapes than ``config.json`` says, or it
            describes no model; names them.
    """
    problems, unknown = _compare(reader, layers)
    if problems:
        raise MoeqError(
            f"{reader.folder} is not the model that its config.json describes: "
            f"{first_few(problems, '; ')}. Get the checkpoint again, or correct config.json"
        )
    if unknown:
        logger.warning(
            "%s: the model that config.json describes has no %s; vLLM may refuse to load it",
            reader.folder,
            first_few(unknown),
        )


def structure_problems(reader: CheckpointReader, layers: Sequence[MoELayer]) -> list[str]:
    """Compare a checkpoint with the model that transformers builds of its ``config.json``.

    Args:
        reader: Of a source or of a packed checkpoint.
        layers: Its MoE layers, whose experts are known to be complete.

    Returns:
        One sentence for each problem; of prediction layers only if transformers does not know the
        model, which is logged.

    Raises:
        MoeqError: ``config.json`` describes no model.
    """
    return _compare(reader, layers)[0]


def _compare(reader: CheckpointReader, layers: Sequence[MoELayer]) -> tuple[list[str], list[str]]:
    """Return the problems, and tensors that the model has no place for."""
    problems = list(prediction_problems(reader, layers))
    model = _meta_model(reader, layers)
    if model is None:
        return problems, []
    names = _outside_experts(reader, layers)
    stored = stored_names(model, names)
    problems += _problems(model, reader, layers, names, stored)
    return problems, list(_unknown(model, reader, stored))


def _meta_model(reader: CheckpointReader, layers: Sequence[MoELayer]) -> Any:
    """Return the model of ``config.json`` without memory; None if transformers does not know it."""
    # Takes seconds to import, which other commands should not wait for.
    from transformers import CONFIG_MAPPING, __version__

    model_type = layers[0].family.runs_as or str(reader.config.get("model_type"))
    if Version(__version__) < OLDEST or model_type not in CONFIG_MAPPING:
        logger.info(
            "transformers %s %s: tensors outside the experts are not checked",
            __version__,
            f"does not know model_type {model_type!r}"
            if model_type not in CONFIG_MAPPING
            else f"is older than {OLDEST}",
        )
        return None
    config = {**reader.config, "model_type": model_type}
    return meta_model(config, str(reader.folder / "config.json"), len(reader.tensors))


def _problems(
    model: Any,
    reader: CheckpointReader,
    layers: Sequence[MoELayer],
    names: Sequence[str],
    stored: Mapping[str, str],
) -> Iterator[str]:
    wanted = _state_on_disk(model)
    yield from _expert_problems(_expert_shapes(wanted, reader, layers[0].family), layers)
    yield from _name_problems(model, names, stored)
    missing = [name for name in wanted if name not in stored and not _EXPERTS.search(name)]
    on_disk = names_on_disk(model, missing)
    ignored = _matcher(model._keys_to_ignore_on_load_missing)
    for name in missing:
        # What another one is tied to is missing on its own account.
        if name in model.all_tied_weights_keys or (ignored and ignored.search(name)):
            continue
        expected = list(wanted[name].shape)
        yield f"tensor {layers[0].family.canonical_name(on_disk[name])} {expected} is missing"
    for name in (name for name in wanted if name in stored):
        info = reader.tensors[stored[name]]
        if info.shape != tuple(wanted[name].shape):
            yield (
                f"tensor {stored[name]} in {info.file} is {list(info.shape)}, config.json makes "
                f"it {list(wanted[name].shape)}"
            )
        elif wanted[name].is_floating_point() and info.dtype not in (*FLOATS, "F64"):
            yield f"tensor {stored[name]} in {info.file} is {info.dtype}, not floating point"
    yield from _tied_problems(model, reader, stored)


def _state_on_disk(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of a model, those that are made of several tensors as these."""
    state: dict[str, torch.Tensor] = model.state_dict()
    for name, parts in parts_on_disk(model).items():
        state |= zip(parts, state.pop(name).chunk(len(parts)), strict=True)
    return state


def _name_problems(model: Any, names: Sequence[str], stored: Mapping[str, str]) -> Iterator[str]:
    """Tell of names that transformers understands, but vLLM does not."""
    root = f"{model.base_model_prefix}."
    for name in sorted(set(names) - set(stored.values())):
        yield f"tensor {name} is there twice, the other one under another name"
    if model.config.model_type in _ANY_ROOT:
        return
    moved = {
        ours: name
        for ours, name in stored.items()
        if ours in (root + name, name.removeprefix(root)) and ours != name
    }
    on_disk = names_on_disk(model, moved)
    for ours, name in moved.items():
        if on_disk[ours] != name:
            yield f"tensor {name} must be called {on_disk[ours]}, as vLLM looks for it"


def _expert_shapes(
    wanted: Mapping[str, torch.Tensor], reader: CheckpointReader, family: Family
) -> dict[int, tuple[str, tuple[int, ...]]]:
    """Return, of each layer, the start of its parameters' names, and what holds down."""
    shapes: dict[int, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in wanted.items():
        canonical = family.canonical_name(name)
        match, within = _EXPERTS.search(name), family.match(canonical)
        if match is None or within is None:
            continue
        index = family.layer_index(reader.config, canonical)
        if match["tensor"] == "down_proj":
            shapes[index] = within["path"], tuple(tensor.shape)
        elif match["tensor"] is None and name.endswith(f".{family.down}.weight"):
            _, (count, *_) = shapes.get(index, ("", (0,)))
            shapes[index] = within["path"], (count + 1, *tensor.shape)
    return shapes


def _expert_problems(
    experts: Mapping[int, tuple[str, tuple[int, ...]]], layers: Sequence[MoELayer]
) -> Iterator[str]:
    by_index = {layer.index: layer for layer in layers}
    for index in sorted(experts.keys() | by_index.keys()):
        layer, (path, shape) = by_index.get(index), experts.get(index, ("", None))
        if layer is None:
            container = path + layers[0].family.experts
            yield f"{container} is missing: config.json gives the layer experts"
        elif shape is None:
            yield f"{layer.container} holds experts, but config.json gives the layer none"
        else:
            stored = layer.num_experts, layer.hidden_size, layer.intermediate_size
            # Some classes have these matrices transposed.
            if (stored[0], *sorted(stored[1:])) != (shape[0], *sorted(shape[1:])):
                yield (
                    f"{layer.container} holds {stored[0]} experts of {stored[1]} x {stored[2]}, "
                    f"config.json says {shape[0]} of {shape[1]} x {shape[2]}"
                )


def _tied_problems(
    model: Any, reader: CheckpointReader, stored: Mapping[str, str]
) -> Iterator[str]:
    for pair in model.all_tied_weights_keys.items():
        if all(name in stored for name in pair):
            tied, other = (stored[name] for name in pair)
            if not torch.equal(reader.tensor(tied), reader.tensor(other)):
                yield (
                    f"tensor {tied} differs from {other}, which would be served in its place: set "
                    "tie_word_embeddings to false in config.json, or remove the tensor"
                )


def _unknown(model: Any, reader: CheckpointReader, names: Mapping[str, str]) -> Iterator[str]:
    """Yield the tensors on disk that the model has no place for and does not leave out either."""
    known = _state_on_disk(model)
    ignored = _matcher(model._keys_to_ignore_on_load_unexpected)
    for name, stored in names.items():
        block = re.match(r"(.*\blayers\.(\d+)\.)?", stored)
        index = int(block[2]) if block and block[2] else 0
        if not (
            name in known
            or _OF_ROTARY.search(stored)
            or drafts_tokens(reader.config, stored, index)
            or (ignored and ignored.search(name))
        ):
            yield stored


def _outside_experts(reader: CheckpointReader, layers: Sequence[MoELayer]) -> list[str]:
    containers = {layer.container for layer in layers}
    experts = {
        name
        for name in reader.tensors
        if (match := re.match(r"(.*)\.\d+\.[^.]+\.[^.]+$", name)) and match[1] in containers
    }
    return [name for name in reader.tensors if name not in experts]


def _matcher(patterns: Any) -> re.Pattern[str] | None:
    return re.compile("|".join(patterns)) if patterns else None
