"""What rounding experts takes: estimates that can be told before it runs."""

from collections.abc import Mapping
from typing import Any

from moeq.allocation import option_sizes
from moeq.checkpoint.families import MoELayer
from moeq.rounding import REFINEMENT

_COPIES = 7.5
"""float32 copies of a matrix while it is rounded: among them its transpose, columns sorted."""


def expert_weights(layer: MoELayer) -> int:
    """Return the number of weights of one expert."""
    return 3 * layer.hidden_size * layer.intermediate_size


def working_bytes(layer: MoELayer) -> int:
    """Return about how much memory rounding one expert takes, without its inputs."""
    most = 0.0
    for rows, columns in (
        (2 * layer.intermediate_size, layer.hidden_size),
        (layer.hidden_size, layer.intermediate_size),
    ):
        # A Hessian and the factor of its inverse, and a third such matrix while it is factored.
        most = max(most, 3 * columns**2, 2 * columns**2 + _COPIES * rows * columns)
    return round(4 * (expert_weights(layer) + most))


def experts_of_a_token(config: Mapping[str, Any], layer: MoELayer) -> int:
    """Return how many experts of a layer get each token."""
    return int(config.get("num_experts_per_tok", layer.num_experts))


def gptq_operations(layers: list[MoELayer], widths: int = 1) -> float:
    """Return about how many floating-point operations GPTQ takes, without its Hessians.

    Args:
        layers: All of whose experts are rounded.
        widths: How often each; their Hessians are factored once.
    """
    total = 0.0
    for layer in layers:
        for _, matrix, _ in layer.weights():
            rows, columns = layer.shape(matrix)
            refined = 4 * (1 + REFINEMENT.rounds)  # feedback, and the rounds after it
            total += widths * rows * columns**2 * refined + 4 * columns**3
    return total


def hessian_operations(layer: MoELayer) -> int:
    """Return the floating-point operations that a token adds to the Hessians of an expert."""
    return 2 * (layer.hidden_size**2 + layer.intermediate_size**2)


def forward_operations(layer: MoELayer) -> int:
    """Return the floating-point operations of an expert for a token."""
    return 2 * expert_weights(layer)


def measuring_bytes(
    layers: list[MoELayer], widths: tuple[int, ...], group_sizes: tuple[int, ...], tokens: int
) -> int:
    """Return the bytes of experts at every width, and of the activations of every layer."""
    activations = 4 * tokens * layers[0].hidden_size * (max(layer.index for layer in layers) + 2)
    experts = sum(int(option_sizes(layers, size, widths).sum()) for size in group_sizes)
    return experts + activations
