"""What measuring every expert at every width takes."""

from moeq.checkpoint import MoELayer
from moeq.checkpoint.sizes import option_sizes


def measuring_bytes(
    layers: list[MoELayer], widths: tuple[int, ...], group_sizes: tuple[int, ...], tokens: int
) -> int:
    """Return the bytes of experts at every width, and of the activations of every layer.

    Those are what experts get, and what the layer gets, whose place the gradient takes.
    """
    streams = 2 * max(layer.index for layer in layers) + 3
    activations = 4 * tokens * layers[0].hidden_size * streams
    experts = sum(int(option_sizes(layers, size, widths).sum()) for size in group_sizes)
    return experts + activations
