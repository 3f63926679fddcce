"""Are layers for multi-token prediction whole?

transformers builds no such layers, and vLLM only when it speculates. Most of their tensors are
those of a decoder layer, and are compared with the model's own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from moeq.checkpoint import CheckpointReader, MoELayer
from moeq.checkpoint.reader import FLOATS
from moeq.checkpoint.servable import PREDICT_AFTER_LAYERS, drafts_tokens, text_config

Shape = tuple[int, ...]
Inside = dict[str, Shape]
"""Shapes of the tensors of a decoder layer, by their names in it."""


class _Style(NamedTuple):
    """How models store prediction layers; as vLLM's classes of them read it.

    Attributes:
        root: Matches what the names of all their tensors start with; None where they stand behind
            the model's own layers.
        block: What the names in a decoder layer start with, behind the root.
        beside: Tensors beside those of a decoder layer, behind the root.
        first: Likewise of the first decoder layer alone, where a prediction has several.
        last: Likewise of the last.
        renamed: Names in a decoder layer that are others there.
        dense: Whether there is a dense MLP in place of experts.
        optional: Starts of names in a decoder layer that may be missing, whatever others have.
    """

    root: str | None = r"(?:.*\.)?mtp\."
    block: str = "layers.{n}."
    beside: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    renamed: Mapping[str, str] = {}
    dense: bool = False
    optional: tuple[str, ...] = ()


_JOINED = ("{block}eh_proj.weight", "{block}enorm.weight", "{block}hnorm.weight")
"""What brings the embedding of a token and a hidden state together."""
_LIKE_DEEPSEEK = PREDICT_AFTER_LAYERS - {"glm5_next", "hy_v3"}
"""Of the others it is not known which tensors they have."""
_QWEN = _Style(
    beside=(
        "fc.weight",
        "norm.weight",
        "pre_fc_norm_embedding.weight",
        "pre_fc_norm_hidden.weight",
    )
)
_STYLES = {
    **dict.fromkeys(
        _LIKE_DEEPSEEK, _Style(None, beside=(*_JOINED, "{block}shared_head.norm.weight"))
    ),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), _QWEN),
    "ernie4_5_moe": _Style(
        r"(?:.*\.)?mtp_",
        "block.{n}.",
        ("emb_norm.{n}.weight", "hidden_norm.{n}.weight", "linear_proj.{n}.weight"),
        dense=True,
    ),
    "mimo_v2_flash": _Style(
        beside=(*_JOINED, "{block}final_layernorm.weight"),
        renamed={"post_attention_layernorm.weight": "pre_mlp_layernorm.weight"},
        dense=True,
    ),
    "nemotron_h": _Style(first=_JOINED, last=("{block}final_layernorm.weight",)),
    "deepseek_v4": _Style(
        block="{n}.",
        beside=(
            *(f"{{block}}{name}.weight" for name in ("enorm", "hnorm", "e_proj", "h_proj", "norm")),
            *(f"{{block}}hc_head_{name}" for name in ("fn", "base", "scale")),
        ),
        optional=("attn.compressor.", "attn.indexer."),  # as config.json says of each layer
    ),
}
_ATTENTION, _EXPERTS = "*", "E"
"""What a decoder layer of Nemotron-H is, as in ``mtp_hybrid_override_pattern``."""
_OF_ATTENTION = "mixer.q_proj.weight"


def prediction_problems(reader: CheckpointReader, layers: Sequence[MoELayer]) -> Iterator[str]:
    """Compare prediction layers with the decoder layer that is most like each.

    Copies of the embeddings and of the output head may be missing: vLLM puts the model's own there.

    Args:
        reader: Of a source or of a packed checkpoint, where prediction layers are not packed.
        layers: Its MoE layers, whose experts are known to be complete.

    Yields:
        One sentence for each tensor that is missing, has another shape or is one too many.
    """
    style = _STYLES.get(str(reader.config.get("model_type")))
    if style is None:
        return
    own = _own_layers(reader, layers)
    experts = {layer.container.removesuffix(layer.family.experts): layer for layer in layers}
    pattern = _pattern(reader)
    for root, blocks in _blocks(reader, layers, style, pattern).items():
        for n, inside in blocks.items():
            block = root + style.block.format(n=n)
            alike = list(own if style.dense else experts)
            if pattern[n : n + 1] == _ATTENTION:
                alike = [path for path in own if _OF_ATTENTION in own[path]]
            if not alike:
                continue
            # Of those that are equally alike the last: it is next to what comes behind it.
            expected = {path: _of_decoder_layer(reader, own[path], style) for path in alike}
            like = max(
                reversed(alike), key=lambda path: len(expected[path].items() & inside.items())
            )
            shapes = {block + name: shape for name, shape in expected[like].items()}
            layer = None if style.dense else experts.get(like)
            if layer is not None:
                shapes |= _expert_shapes(block, layer)
            beside = (
                *style.beside,
                *(style.first if n == 0 else ()),
                *(style.last if n == max(blocks) else ()),
            )
            for name in beside:
                name = root + name.format(n=n, block=style.block.format(n=n))
                shapes[name] = _shape_beside(name, reader, layers[0].hidden_size)
            yield from _differences(reader, shapes)
            if layer is not None:
                yield from _superfluous(reader, f"{block}{layer.family.experts}.", shapes, layer)


def _own_layers(reader: CheckpointReader, layers: Sequence[MoELayer]) -> dict[str, Inside]:
    """Return what the model's decoder layers have beside experts, by their paths."""
    root, family = _root(layers), layers[0].family
    own: dict[str, Inside] = {}
    for name, info in reader.tensors.items():
        match = re.match(rf"({re.escape(root)}layers\.(\d+)\.)(.+)", name)
        if match is None or drafts_tokens(reader.config, match[1], int(match[2])):
            continue
        if not match[3].startswith(f"{family.experts}.") and info.dtype in FLOATS:
            own.setdefault(match[1], {})[match[3]] = info.shape
    return own


def _root(layers: Sequence[MoELayer]) -> str:
    path = layers[0].container.removesuffix(layers[0].family.experts)
    return re.sub(r"layers\.\d+\.$", "", path)


def _blocks(
    reader: CheckpointReader, layers: Sequence[MoELayer], style: _Style, pattern: str
) -> dict[str, dict[int, Inside]]:
    """Return what is there of the decoder layers of predictions, by root and number."""
    root = re.escape(_root(layers)) if style.root is None else style.root
    number = re.escape(style.block).replace(re.escape("{n}"), r"(?P<n>\d+)")
    layers_of_root: dict[str, dict[int, Inside]] = {}
    for name, info in reader.tensors.items():
        match = re.match(rf"(?P<root>{root})(?P<block>{number})?(?P<inside>.*)", name)
        if match is None:
            continue
        if style.root is None:
            index = -1 if match["n"] is None else int(match["n"])
            if not drafts_tokens(reader.config, name, index):
                continue
        blocks = layers_of_root.setdefault(match["root"], {})
        if style.root is not None:  # the rest of a prediction alone is not one
            for n in range(max(len(pattern), 1)):
                blocks.setdefault(n, {})
        if match["n"] is not None:
            blocks.setdefault(int(match["n"]), {})[match["inside"]] = info.shape
    return layers_of_root


def _pattern(reader: CheckpointReader) -> str:
    """Return what the decoder layers of Nemotron-H's predictions are, a letter each."""
    if reader.config.get("model_type") != "nemotron_h":
        return ""
    stated = reader.config.get("mtp_hybrid_override_pattern")
    if isinstance(stated, str):
        return stated
    kinds = reader.config.get("mtp_layers_block_type") or ("attention", "moe")
    return "".join(_EXPERTS if kind == "moe" else _ATTENTION for kind in kinds)


def _of_decoder_layer(reader: CheckpointReader, like: Inside, style: _Style) -> Inside:
    """Return what a decoder layer of a prediction must have beside experts."""
    left_out = (*style.optional, *(("mlp.",) if style.dense else ()))
    inside = {
        style.renamed.get(name, name): shape
        for name, shape in like.items()
        if not name.startswith(left_out)
    }
    if style.dense:
        text = text_config(reader.config)
        hidden, inner = text["hidden_size"], text["intermediate_size"]
        inside |= {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        inside["mlp.down_proj.weight"] = hidden, inner
    return inside


def _expert_shapes(block: str, like: MoELayer) -> dict[str, Shape]:
    container = block + like.family.experts
    return {
        like.family.tensor_name(container, expert, matrix): like.shape(matrix)
        for expert, matrix, _ in like.weights()
    }


def _shape_beside(name: str, reader: CheckpointReader, hidden_size: int) -> Shape:
    """Return the shape of a norm, or of what projects a token and a hidden state."""
    if re.search(r"\b(eh_proj|fc|mtp_linear_proj\.\d+)\.weight$", name):
        return hidden_size, 2 * hidden_size
    if re.search(r"\b[eh]_proj\.weight$", name):
        return hidden_size, hidden_size
    streams = text_config(reader.config).get("hc_mult", 1)
    of_streams = {
        "hc_head_fn": (streams, streams * hidden_size),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
    }
    return of_streams.get(name.rpartition(".")[2], (hidden_size,))


def _differences(reader: CheckpointReader, shapes: Mapping[str, Shape]) -> Iterator[str]:
    for name, shape in sorted(shapes.items()):
        info = reader.tensors.get(name)
        if info is None:
            yield f"tensor {name} {list(shape)} of a prediction layer is missing"
        elif info.shape != shape:
            yield (
                f"tensor {name} of a prediction layer in {info.file} is {list(info.shape)}, "
                f"those of other layers are {list(shape)}"
            )
        elif info.dtype not in FLOATS:
            yield f"tensor {name} in {info.file} is {info.dtype}, not floating point"


def _superfluous(
    reader: CheckpointReader, experts: str, shapes: Mapping[str, Shape], like: MoELayer
) -> Iterator[str]:
    for name in reader.tensors:
        if name.startswith(experts) and name not in shapes:
            yield f"tensor {name} is of no expert: layers have {like.num_experts} of them"
