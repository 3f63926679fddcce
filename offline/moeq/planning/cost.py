"""What measuring every expert at every width takes."""

from moeq.checkpoint import SourceModel
from moeq.checkpoint.servable import text_config
from moeq.checkpoint.sizes import option_sizes
from moeq.errors import MoeqError


def measuring_bytes(
    source: SourceModel, widths: tuple[int, ...], group_sizes: tuple[int, ...], tokens: int
) -> int:
    """Return the bytes of experts at every width, and of activations.

    Those are what each layer gets, and what goes in and out of the experts of one. On the way back
    activations go while experts come; but a run that goes on when all is measured has both.

    Raises:
        MoeqError: The number of layers in ``config.json`` is no number.
    """
    layers = source.layers
    stated = text_config(source.reader.config).get("num_hidden_layers", 0)
    if not isinstance(stated, int):  # transformers would say so, but need not know the model
        raise MoeqError(
            f"{source.folder}: config.json has num_hidden_layers {stated!r}, no number of layers"
        )
    depth = max(stated, *(layer.index + 1 for layer in layers))
    activations = 4 * tokens * source.hidden_size * (depth + 2)
    experts = sum(int(option_sizes(layers, size, widths).sum()) for size in group_sizes)
    return experts + activations
