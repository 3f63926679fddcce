"""The change of each expert's router l2 norm in training."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moeq.checkpoint import CheckpointReader, MoELayer, SourceModel
from moeq.checkpoint.reader import resolve_model
from moeq.errors import MoeqError

_ENDS_OF_ROUTERS = tuple(
    f".{name}.weight"
    for name in ("gate", "router", "gate.wg", "router.layer", "router.proj", "router.classifier")
)

_LAYER = re.compile(r"\blayers?\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class RouterNorms:
    """Router norm signal of one layer.

    Attributes:
        values: float32 [num_experts]; small means rare features, so more bits.
        surrogate: True if there was no initial router and ``values`` are the final norms.
    """

    values: torch.Tensor
    surrogate: bool


def router_norms(
    source: SourceModel, layer: MoELayer, base: Mapping[str, torch.Tensor] | None
) -> RouterNorms:
    """Return the norm change of each expert's router row, or its surrogate.

    With w_s the row of expert s: ``||w_s final|| - ||w_s initial||`` (arXiv 2604.06515,
    section 3). Without an initial router, the final norm alone, as the paper does for public
    checkpoints.

    Args:
        source: The checkpoint being quantized.
        layer: One of its MoE layers.
        base: What :func:`load_base_routers` returned, or None.

    Raises:
        MoeqError: The initial router has another shape, or a router is not finite.
    """
    final = source.tensor(layer.router).float()
    values = final.norm(dim=1)
    if base is not None:
        initial = base[layer.router].float()
        if initial.shape != final.shape:
            raise MoeqError(
                f"`base_router`: the initial router for {layer.router} has shape "
                f"{list(initial.shape)}, the model's has {list(final.shape)}"
            )
        values = values - initial.norm(dim=1)
    if not torch.isfinite(values).all():
        raise MoeqError(f"{layer.router} or its initial router holds NaN or infinite weights")
    return RouterNorms(values, surrogate=base is None)


def load_base_routers(source: str, layers: list[MoELayer]) -> dict[str, torch.Tensor]:
    """Read the routers from before training.

    Args:
        source: A checkpoint (folder or hub id), or a safetensors file that holds router weights,
            such as the one that ``moeq.RouterNormTracker`` writes.
        layers: MoE layers of the model being quantized.

    Returns:
        The model's router names to the initial routers. Names that differ are matched by their
        layer number, since transformers names modules differently in memory and on disk.

    Raises:
        MoeqError: The source cannot be read or lacks the router of a layer; names it.
    """
    path = Path(source)
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                return {
                    layer.router: file.get_tensor(_find(names, layer, source)) for layer in layers
                }
        except SafetensorError as error:
            raise MoeqError(f"`base_router` {source} is no safetensors file ({error})") from error
    reader = CheckpointReader(resolve_model(source))
    names = set(reader.tensors)
    return {layer.router: reader.tensor(_find(names, layer, source)) for layer in layers}


def _find(names: set[str], layer: MoELayer, source: str) -> str:
    if layer.router in names:
        return layer.router
    same_layer = [
        name
        for name in sorted(names)
        if name.endswith(_ENDS_OF_ROUTERS)
        and (match := _LAYER.search(name))
        and int(match[1]) == layer.index
    ]
    if len(same_layer) != 1:
        candidates = "several candidates" if same_layer else "nothing"
        raise MoeqError(
            f"`base_router` {source}: found {candidates} for the router {layer.router} "
            f"(layer {layer.index})"
        )
    return same_layer[0]
