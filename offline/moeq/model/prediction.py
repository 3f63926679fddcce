"""Are layers for multi-token prediction whole?

transformers builds no such layers, and vLLM only when it speculates. Where vLLM makes them of the
model's own decoder layers, they are compared with those.
"""

import re
from collections.abc import Iterator, Sequence

from moeq.checkpoint import CheckpointReader, MoELayer
from moeq.checkpoint.reader import FLOATS
from moeq.checkpoint.servable import PREDICT_AFTER_LAYERS, drafts_tokens

_PREDICT_IN_MTP = {"qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"}
"""Models whose ``mtp`` holds decoder layers like the model's own."""
_IN_LAYER = ("eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight")
"""What a prediction layer after a model's own layers has beside a decoder layer."""
_IN_MTP = ("fc.weight", "norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")
"""What is in ``mtp`` beside decoder layers."""

_MTP = re.compile(r"((?:.*\.)?mtp\.)")


def prediction_problems(reader: CheckpointReader, layers: Sequence[MoELayer]) -> Iterator[str]:
    """Compare prediction layers with the decoder layer that is most like each.

    Copies of the embeddings and of the output head may be missing: vLLM puts the model's own there.

    Args:
        reader: Of a source or of a packed checkpoint, where prediction layers are not packed.
        layers: Its MoE layers, whose experts are known to be complete.

    Yields:
        One sentence for each tensor that is missing, has another shape or is one too many.
    """
    model_type = str(reader.config.get("model_type"))
    if model_type not in PREDICT_AFTER_LAYERS | _PREDICT_IN_MTP:
        return
    blocks: dict[str, set[str]] = {}
    for name in reader.tensors:
        if match := re.match(r"((?:.*\.)?layers\.\d+\.)(.+)", name):
            blocks.setdefault(match[1], set()).add(match[2])
    for root in {match[1] for name in reader.tensors if (match := _MTP.match(name))}:
        blocks.setdefault(f"{root}layers.0.", set())
    own = {layer.container.removesuffix(layer.family.experts): layer for layer in layers}
    root = re.sub(r"layers\.\d+\.$", "", next(iter(own)))
    for block, inside in blocks.items():
        mtp, index = _MTP.match(block), int(block.split(".")[-2])
        if not (mtp or (block.startswith(root) and drafts_tokens(reader.config, block, index))):
            continue
        like = max(own, key=lambda other: len(blocks[other] & inside))
        shapes = {
            block + name: reader.tensors[like + name].shape
            for name in blocks[like]
            if not name.startswith(f"{own[like].family.experts}.")
        }
        shapes |= _expert_shapes(block, own[like])
        beside = [mtp[1] + name for name in _IN_MTP] if mtp else [block + n for n in _IN_LAYER]
        shapes |= {name: _shape_beside(name, own[like].hidden_size) for name in beside}
        yield from _differences(reader, shapes)
        experts = f"{block}{own[like].family.experts}."
        for name in reader.tensors:
            if name.startswith(experts) and name not in shapes:
                yield f"tensor {name} is of no expert: layers have {own[like].num_experts} of them"


def _expert_shapes(block: str, like: MoELayer) -> dict[str, tuple[int, ...]]:
    container = block + like.family.experts
    return {
        like.family.tensor_name(container, expert, matrix): like.shape(matrix)
        for expert, matrix, _ in like.weights()
    }


def _shape_beside(name: str, hidden_size: int) -> tuple[int, ...]:
    """Return the shape of a norm, or of what projects a token and a hidden state together."""
    projects = name.endswith(("eh_proj.weight", "fc.weight"))
    return (hidden_size, 2 * hidden_size) if projects else (hidden_size,)


def _differences(reader: CheckpointReader, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in sorted(shapes.items()):
        found = reader.tensors.get(name)
        if found is None:
            yield f"tensor {name} {list(shape)} of a prediction layer is missing"
        elif found.shape != shape:
            yield (
                f"tensor {name} of a prediction layer in {found.file} is {list(found.shape)}, "
                f"those of other layers are {list(shape)}"
            )
        elif found.dtype not in FLOATS:
            yield f"tensor {name} in {found.file} is {found.dtype}, not floating point"
