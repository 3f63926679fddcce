"""What a checkpoint must hold beside its experts, so that the result can be served."""

from collections.abc import Mapping, Sequence
from typing import Any

from moeq.checkpoint.families import MoELayer
from moeq.checkpoint.reader import CheckpointReader
from moeq.errors import MoeqError

HEAD = "lm_head.weight"
_EXPERT_COUNTS = (
    "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts",
)  # fmt: skip
"""Names of the number of routed experts; they differ between families and releases."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of ``config.json`` that describes the language model."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def drafts_tokens(config: Mapping[str, Any], block: str, index: int) -> bool:
    """Say whether a decoder layer is one for multi-token prediction, which stays as it is.

    Such layers are under a name of their own, or come after the model's own layers.

    Args:
        config: ``config.json``.
        block: Path of the layer.
        index: Its number in there.
    """
    layers = text_config(config).get("num_hidden_layers")
    return "mtp" in block.split(".") or (isinstance(layers, int) and index >= layers)


def check_head(reader: CheckpointReader) -> None:
    """Check that there is an output head, or that the embeddings serve as one.

    Raises:
        MoeqError: There is none. vLLM would serve one of uninitialised memory.
    """
    tied = reader.config.get(
        "tie_word_embeddings", text_config(reader.config).get("tie_word_embeddings")
    )
    if tied is False and not any(name.endswith(HEAD) for name in reader.tensors):
        raise MoeqError(
            f"{reader.folder}: tensor {HEAD} is missing, and config.json says that it is not tied "
            "to the embeddings (tie_word_embeddings false). Get the checkpoint again, or set "
            "tie_word_embeddings to true if the model was trained so"
        )


def check_expert_counts(config: Mapping[str, Any], layers: Sequence[MoELayer]) -> None:
    """Check that each layer has as many experts as ``config.json`` says: vLLM builds so many.

    Raises:
        MoeqError: One has not; names it.
    """
    counts = [text_config(config).get(name) for name in _EXPERT_COUNTS]
    stated = {count for count in counts if isinstance(count, int)}
    for layer in layers:
        if stated and layer.num_experts not in stated:
            raise MoeqError(
                f"{layer.router} has rows for {layer.num_experts} experts, config.json says "
                f"{' or '.join(map(str, sorted(stated)))}: a model whose layers differ in their "
                "number of experts, as after pruning, cannot be served. Give every layer the same "
                "number, and write it into config.json"
            )
