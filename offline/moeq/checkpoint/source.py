"""The model to be quantized: its tensors on disk, its MoE layers, and its name."""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moeq.checkpoint.canonical import CanonicalReader
from moeq.checkpoint.families import Family, MoELayer, family_of
from moeq.checkpoint.linear import LinearGroup, linear_groups
from moeq.checkpoint.precision import source_format
from moeq.checkpoint.reader import FLOATS, CheckpointReader, resolve_model
from moeq.checkpoint.servable import drafts_tokens
from moeq.errors import MoeqError
from moeq.rounding import LinearWeight
from moeq.units import public_name


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A checkpoint whose experts can be read in 16 or 32 bits, one matrix after another.

    Attributes:
        name: The model as the user named it: a folder or hub id.
        reader: Its tensors, under canonical names.
        layers: Its MoE layers, in order.
        left_out: Names of tensors that are not read, since vLLM would not start with them.
        linear: Its dense layers that can be quantized.
    """

    name: str
    reader: CheckpointReader
    layers: list[MoELayer]
    left_out: tuple[str, ...] = ()
    linear: tuple[LinearGroup, ...] = ()

    @classmethod
    def open(cls, name: str | Path, embeddings: bool = False) -> "SourceModel":
        """Open a folder or hub id.

        Args:
            name: Folder or hub id.
            embeddings: Whether :attr:`linear` has those of tokens and the output head.

        Raises:
            MoeqError: No supported MoE model, one that cannot be served, or an expert weight is
                missing, has a wrong shape or is not 16- or 32-bit floating point; names it.
        """
        reader = CanonicalReader(resolve_model(str(name)))
        layers = moe_layers(reader)
        groups = linear_groups(reader, layers, embeddings)
        return cls(str(name), reader, layers, tuple(reader.left_out), tuple(groups))

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to other processes as the folder that it was read from."""
        return opened, self.opened_from

    @property
    def opened_from(self) -> tuple[str, str, str]:
        """Arguments with which :func:`opened` gives it in another process."""
        stamp = repr(sorted(self.reader.file_stats().items()))
        return str(self.folder.absolute()), self.name, stamp

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.reader.folder

    @property
    def public_name(self) -> str:
        """What others may know of the name: a hub id, or the last part of a path."""
        return public_name(self.name)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.layers[0].hidden_size

    @property
    def precision(self) -> str | None:
        """The format of a source in lower precision, which is read as bfloat16; else None."""
        stored = source_format(self.reader.config, self.folder)
        if stored is None:
            return None
        return stored.name if stored.bits is None else f"{stored.name}, {stored.bits} bits"

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.reader.tensors.values())

    @property
    def weights(self) -> int:
        """Number of weights in all tensors."""
        return sum(torch.Size(info.shape).numel() for info in self.reader.tensors.values())

    @property
    def other_bytes(self) -> int:
        """Bytes of the tensors that are no weights of routed experts and keep their size."""
        experts = sum(
            self.reader.info(layer.tensor_name(expert, matrix)).num_bytes
            for layer in self.layers
            for expert, matrix, _ in layer.weights()
        )
        return self.num_bytes - experts

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Raises:
            MoeqError: There is no such tensor, or its file has gone; names it.
        """
        return self.reader.tensor(name)

    def integers(self, weight: str, group_size: int) -> LinearWeight:
        """Return the weight of a dense layer as the source stores it.

        Args:
            weight: Of a group of layers that can be copied with the group size.
            group_size: Weights of a row that share a scale; those of the source may be larger.
        """
        stored = self.reader.integers[weight]
        scale = stored.scale().to(torch.bfloat16)
        return LinearWeight(
            stored.words().contiguous(),
            scale.repeat_interleave(stored.group_size // group_size, 1),
            torch.tensor(self.reader.info(weight).shape),
        )

    def asked_for(self, dense_bits: str | int) -> "SourceModel":
        """Return the source without integers in dense layers that are to have another width.

        Args:
            dense_bits: What the user asks for; with ``auto`` they keep the width that they have.
        """
        groups = (
            group if dense_bits in ("auto", group.stored_bits) else group.without_integers()
            for group in self.linear
        )
        return replace(self, linear=tuple(groups))


@lru_cache(maxsize=1)
def opened(folder: str, name: str, stamp: str) -> SourceModel:
    """Return a model that another process has opened, the same as long as its files are.

    Args:
        folder: Where it lies.
        name: As the user named it.
        stamp: Another one if files have changed.
    """
    return replace(SourceModel.open(folder), name=name)


def moe_layers(reader: CheckpointReader) -> list[MoELayer]:
    """Return the MoE layers of a checkpoint, in order; those that only draft tokens are left out.

    Raises:
        MoeqError: As :meth:`SourceModel.open`.
    """
    family = family_of(reader.config)
    block = rf"(?P<block>.*\b{family.layer})"
    expert_tensors = _matching(reader, rf"{block}{re.escape(family.experts)}\.\d+\..+")
    if not expert_tensors:
        experts = f"{family.example}{family.experts}"
        raise MoeqError(
            f"{reader.folder} has no tensor like {experts}.0.{family.gate or family.up}.weight "
            f"or {experts}.gate_up_proj, as model_type "
            f"{reader.config.get('model_type')!r} should; it has {_found(reader)}"
        )
    routers = _matching(reader, block + re.escape(family.router))
    # A layer is one that has a router or an expert: if either is missing, it is an error.
    blocks = dict.fromkeys(match["block"] for match in (*expert_tensors, *routers))
    layers = [_moe_layer(reader, family, block) for block in blocks]
    weights = {
        layer.tensor_name(expert, matrix)
        for layer in layers
        for expert, matrix, _ in layer.weights()
    }
    if family.biased:
        weights |= {
            layer.bias_name(expert, matrix)
            for layer in layers
            for expert, matrix, _ in layer.weights()
        }
    for match in expert_tensors:
        if match.string not in weights:
            raise MoeqError(
                f"{reader.folder}: {match.string} is no weight of an expert that the router of "
                "its layer knows"
            )
    return sorted(layers, key=lambda layer: layer.index)


def _found(reader: CheckpointReader) -> str:
    """Return names that show how a checkpoint calls its experts."""
    names = [name for name in reader.tensors if "expert" in name] or list(reader.tensors)
    return ", ".join(names[:3]) + (" and so on" if len(names) > 3 else "")


def _matching(reader: CheckpointReader, pattern: str) -> list[re.Match[str]]:
    compiled = re.compile(pattern)
    matches = [match for name in reader.tensors if (match := compiled.fullmatch(name))]
    return [
        match
        for match in matches
        if not drafts_tokens(reader.config, match["block"], int(match["index"]))
    ]


def _moe_layer(reader: CheckpointReader, family: Family, block: str) -> MoELayer:
    container, router = block + family.experts, block + family.router
    first_name = f"{container}.0.{family.gate or family.up}.weight"
    first = reader.info(first_name)
    if len(first.shape) != 2 or 0 in first.shape:
        raise MoeqError(f"{first_name} has shape {list(first.shape)}, expected a matrix")
    # The router knows how many experts there are; config.json names the number differently
    # from one release of transformers to the next.
    if not reader.info(router).shape:
        raise MoeqError(f"{router} has shape [], expected a matrix")
    num_experts = reader.info(router).shape[0]
    layer = MoELayer(
        index=family.layer_index(reader.config, block),
        container=container,
        router=router,
        family=family,
        num_experts=num_experts,
        hidden_size=first.shape[1],
        intermediate_size=first.shape[0],
    )
    _check(reader, router, (num_experts, layer.hidden_size))
    for expert, matrix, _ in layer.weights():
        _check(reader, layer.tensor_name(expert, matrix), layer.shape(matrix))
        if family.biased:
            _check(reader, layer.bias_name(expert, matrix), layer.shape(matrix)[:1])
    return layer


def _check(reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> None:
    info = reader.info(name)
    if info.shape != shape:
        raise MoeqError(f"{name} has shape {list(info.shape)}, expected {list(shape)}")
    if info.dtype not in FLOATS:
        raise MoeqError(f"{name} has type {info.dtype}, expected one of {', '.join(FLOATS)}")
