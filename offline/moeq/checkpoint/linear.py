"""The dense layers of a model: those in front of and beside its routed experts, and embeddings."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from moeq.checkpoint.families import MoELayer
from moeq.checkpoint.reader import FLOATS, CheckpointReader
from moeq.checkpoint.servable import (
    DECODER_LAYER,
    drafts_tokens,
    linear_attention_layers,
    text_config,
)
from moeq.errors import MoeqError
from vllm_moeq.format import BitPlan, linear_bytes

FULL_WIDTH = 16
"""Bits per weight of a layer that a plan does not name."""
_STAGES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa")),
    (("q_b_proj",),),
    (("o_proj",), ("self_attn.out_proj",)),
    (("gate_proj", "up_proj"), ("input_linear",), ("feed_forward.w1", "feed_forward.w3")),
    (("down_proj",), ("output_linear",), ("feed_forward.w2",)),
    (("embed_tokens",), ("lm_head",)),
)
"""Dense layers in the order in which they run; those in a tuple are one layer in vLLM, and so have
one width. A name with the part in front means that part alone: convolutions have an out_proj, too.
Routers, norms, projections of linear attention (whatever their names: see
``linear_attention_layers``) and of state spaces, and what MLA multiplies into attention itself
(``kv_b_proj``) are none of them: they keep their 16 bits. The embeddings come
last: each is alone, before and after all decoder layers."""
_ATTENTION = {group for stage in _STAGES[:3] for group in stage}
_NAMES = {name: group for stage in _STAGES for group in stage for name in group}
_EMBEDDINGS = re.compile(r"(?:(?:model|language_model)\.)*(embed_tokens|lm_head)\.weight")
_TIED = {"lfm2_moe"}
"""Models whose class in vLLM has one matrix for embeddings and output head in any case."""
_PLAIN_INPUT = {"gpt_oss"}
"""Models whose class in vLLM has another name for the embeddings of tokens, if not packed."""
INPUT = -1
"""In the place of a decoder layer: the embeddings of tokens, in front of all."""
_ROWS = 32
"""Of which the kernels of vLLM take whole multiples."""


def _group(weight: str) -> tuple[str, ...] | None:
    """Return the names of the layers that run as one with that of a weight; None if it is none."""
    _, parent, name, _ = f"...{weight}".rsplit(".", 3)
    return _NAMES.get(name) or _NAMES.get(f"{parent}.{name}")


class LinearGroup(NamedTuple):
    """Dense layers that have one width, and get the same inputs.

    Attributes:
        layer: Number of the decoder layer; :data:`INPUT` for the embeddings of tokens, and the
            number of layers for the output head.
        weights: Names of their weights on disk.
        shapes: (rows, columns) of each.
        full_bytes: Of all weights as they are read, in 16 or 32 bits.
        stored_bits: Width of the integers that the source stores; 16 if it stores none that can be
            copied.
        stored_group_size: Weights of a row that share a scale there.
    """

    layer: int
    weights: tuple[str, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()
    full_bytes: int = 0
    stored_bits: int = FULL_WIDTH
    stored_group_size: int = 0

    @property
    def rows(self) -> int:
        """Rows of all weights."""
        return sum(rows for rows, _ in self.shapes)

    @property
    def columns(self) -> int:
        """Columns of each weight: they get the same inputs."""
        return self.shapes[0][1]

    @property
    def looks_up(self) -> bool:
        """Whether it is no linear layer: tokens choose rows."""
        return self.layer == INPUT

    @property
    def embeds(self) -> bool:
        """Whether its rows are of tokens: the embeddings, or the output head."""
        return bool(_EMBEDDINGS.fullmatch(self.weights[0]))

    @property
    def stage(self) -> int:
        """Place in the order in which the dense layers of a decoder layer run."""
        group = _group(self.weights[0])
        return next(i for i, stage in enumerate(_STAGES) if group in stage)

    def num_bytes(self, bits: int, group_size: int) -> int:
        """Return the bytes of all weights at 4 or 8 bits with their scales, or as they are read."""
        if bits == FULL_WIDTH:
            return self.full_bytes
        return sum(linear_bytes(*shape, bits, group_size) for shape in self.shapes)

    def fits(self, group_size: int) -> bool:
        """Tell whether rows are whole groups."""
        return all(columns % group_size == 0 for _, columns in self.shapes)

    def copies(self, bits: int, group_size: int) -> bool:
        """Tell whether weights with this width are those of the source, and need no rounding.

        Larger groups than ours are as many of ours with the same scale.
        """
        return bits == self.stored_bits < FULL_WIDTH and self.stored_group_size % group_size == 0

    def width(self, asked: int, group_size: int) -> int:
        """Return the width asked for, or the smaller one that the weights have already."""
        return min(asked, self.stored_bits) if self.copies(self.stored_bits, group_size) else asked

    def without_integers(self) -> "LinearGroup":
        """Return the same layers as if their source did not store integers."""
        return self._replace(stored_bits=FULL_WIDTH, stored_group_size=0)


def linear_groups(
    reader: CheckpointReader, layers: Sequence[MoELayer], embeddings: bool = False
) -> list[LinearGroup]:
    """Return the dense layers that can be quantized, in the order of decoder layers and files.

    Args:
        reader: Of a source.
        layers: Its MoE layers.
        embeddings: Whether those of tokens and the output head are among them.
    """
    root = re.match(r"(.*\blayers\.)\d+\.", layers[0].container)
    if root is None:
        return []
    pattern = re.compile(rf"({re.escape(root[1])}(\d+)\.(?:.*\.)?)[^.]+\.weight")
    experts = tuple(f"{layer.container}." for layer in layers)
    linear_attention = linear_attention_layers(reader.config)
    by_key: dict[tuple[str, tuple[str, ...]], LinearGroup] = {}
    refused = set()
    for name, info in reader.tensors.items():
        match = pattern.fullmatch(name)
        together = _group(name)
        if match is None or together is None or name.startswith(experts):
            continue
        key, index = (match[1], together), int(match[2])
        if drafts_tokens(reader.config, name, index):
            continue
        if index in linear_attention and together in _ATTENTION:
            continue
        if len(info.shape) != 2 or info.shape[0] % _ROWS or info.dtype not in FLOATS:
            refused.add(key)
            continue
        group = by_key.get(key, LinearGroup(index))
        by_key[key] = LinearGroup(
            index,
            (*group.weights, name),
            (*group.shapes, (info.shape[0], info.shape[1])),
            group.full_bytes + info.num_bytes,
        )
    groups = [
        _with_integers(reader, group)
        for key, group in by_key.items()
        if key not in refused and not _shares_keys(group.weights)
    ]
    if embeddings and not layers[0].family.encodes:
        groups += _embeddings(reader)
    return sorted(groups, key=lambda group: group.layer)


def _embeddings(reader: CheckpointReader) -> list[LinearGroup]:
    """Return the embeddings of tokens and the output head, but for those of two uses.

    One matrix may be both, and layers that predict tokens share them with the model.
    """
    text = text_config(reader.config)
    num_layers, model_type = text.get("num_hidden_layers"), str(text.get("model_type"))
    tied = text.get("tie_word_embeddings", reader.config.get("tie_word_embeddings", False))
    stored = {match[1]: match[0] for match in map(_EMBEDDINGS.fullmatch, reader.tensors) if match}
    if tied or model_type in _TIED or len(stored) < 2 or _has_prediction_layers(reader):
        return []
    if not isinstance(num_layers, int):
        return []
    groups = []
    for name, layer in (("embed_tokens", INPUT), ("lm_head", num_layers)):
        info = reader.tensors[stored[name]]
        if len(info.shape) != 2 or info.shape[0] % _ROWS or info.dtype not in FLOATS:
            continue
        if layer == INPUT and model_type in _PLAIN_INPUT:
            continue
        rows, columns = info.shape
        groups.append(LinearGroup(layer, (stored[name],), ((rows, columns),), info.num_bytes))
    return groups


def _has_prediction_layers(reader: CheckpointReader) -> bool:
    def predicts(name: str) -> bool:
        match = DECODER_LAYER.match(name)
        return drafts_tokens(reader.config, name, int(match[1]) if match else 0) or any(
            part.startswith("mtp_") for part in name.split(".")
        )

    return any(map(predicts, reader.tensors))


def _with_integers(reader: CheckpointReader, group: LinearGroup) -> LinearGroup:
    """Note the integers that a source stores, if the format can hold all of them as they are."""
    integers = [reader.integers.get(weight) for weight in group.weights]
    stored = [matrix for matrix in integers if matrix is not None]
    if len(stored) < len(integers) or len({matrix.bits for matrix in stored}) > 1:
        return group
    if not all(_is_storable(matrix.scale()) for matrix in stored):
        return group
    group_size = math.gcd(*(matrix.group_size for matrix in stored))
    return group._replace(stored_bits=stored[0].bits, stored_group_size=group_size)


def _is_storable(scale: torch.Tensor) -> bool:
    """Tell whether scales are finite values of both float16 and bfloat16."""
    values = scale.float()
    narrow = [values.to(dtype).float() for dtype in (torch.float16, torch.bfloat16)]
    return bool(values.isfinite().all()) and all(torch.equal(values, other) for other in narrow)


def _shares_keys(weights: tuple[str, ...]) -> bool:
    """Tell whether values are the keys, as in Gemma-4: vLLM has a layer for both, from one."""
    names = {weight.split(".")[-2] for weight in weights}
    return "k_proj" in names and "v_proj" not in names


def linear_bits(bits: Mapping[LinearGroup, int]) -> dict[str, int]:
    """Return the ``linear_bits`` of a plan from the widths of groups."""
    return {
        weight.removesuffix(".weight"): width
        for group, width in bits.items()
        if width != FULL_WIDTH
        for weight in group.weights
    }


def uniform_linear_bits(
    groups: Iterable[LinearGroup], bits: int, group_size: int
) -> dict[str, int]:
    """Return the ``linear_bits`` of a plan in which all layers that can have it have one width.

    Layers that the source stores with a smaller one keep that.
    """
    return linear_bits(
        {group: group.width(bits, group_size) for group in groups if group.fits(group_size)}
    )


def group_widths(plan: BitPlan, groups: Iterable[LinearGroup]) -> dict[LinearGroup, int]:
    """Return the width of each group in a plan, 16 for those that it does not name.

    Raises:
        MoeqError: It names what is no such layer, one whose rows are no whole groups, or only some
            of those that have one width; names it.
    """
    unknown = dict(plan.linear_bits)
    widths = {}
    for group in groups:
        of_group = {
            weight: unknown.pop(weight.removesuffix(".weight"), FULL_WIDTH)
            for weight in group.weights
        }
        width, *others = set(of_group.values())
        if others:
            raise MoeqError(
                f"linear_bits: {' and '.join(of_group)} are one layer in vLLM and need one width, "
                f"not {' and '.join(map(str, of_group.values()))}"
            )
        if width != FULL_WIDTH and not group.fits(plan.group_size):
            raise MoeqError(
                f"linear_bits: group size {plan.group_size} does not divide the "
                f"{group.columns} columns of {group.weights[0]}"
            )
        widths[group] = width
    if unknown:
        raise MoeqError(
            f"linear_bits names {next(iter(unknown))}, which is no dense layer of this model that "
            "moeq quantizes"
        )
    return widths


def copied_weights(plan: BitPlan, groups: Iterable[LinearGroup]) -> set[str]:
    """Return the names of the weights that a plan takes from the source as they are stored."""
    return {
        weight
        for group, bits in group_widths(plan, groups).items()
        if group.copies(bits, plan.group_size)
        for weight in group.weights
    }


def lost_integers(groups: Iterable[LinearGroup], group_size: int) -> list[LinearGroup]:
    """Return the groups that could be copied with another group size."""
    return [
        group
        for group in groups
        if group.stored_bits < FULL_WIDTH and not group.copies(group.stored_bits, group_size)
    ]


def linear_widths(plan: BitPlan) -> dict[str, int]:
    """Return the widths of dense layers below 16 bits by the names of their weights."""
    return {f"{name}.weight": bits for name, bits in plan.linear_bits.items()}
