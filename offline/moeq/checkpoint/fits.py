"""Whether experts can be packed with a group size, and whether a plan is one of their model."""

from moeq.checkpoint.families import MoELayer
from moeq.errors import MoeqError
from vllm_moeq.format import CODES_PER_WORD, GROUP_SIZES, BitPlan

_NONE_FITS = (
    f"it is no multiple of {GROUP_SIZES[0]}, so the experts cannot be packed with any group size, "
    "and zeros cannot be added, which norms would count"
)
_USUAL_BITS, _BITS_OF_A_GROUP = 2.5, 24
"""Of a weight, and of the scale and the zero point of a group."""


def check_plan_fits(plan: BitPlan, layers: list[MoELayer]) -> None:
    """Check that a plan was made for a model of these layers.

    Raises:
        MoeqError: A layer is missing, unknown or has another number of experts, or cannot be
            packed with the group size.
    """
    ours = {layer.container for layer in layers}
    planned = set(plan.expert_bits)
    if ours != planned:
        missing, extra = sorted(ours - planned), sorted(planned - ours)
        parts = [f"it lacks {missing[0]}"] if missing else []
        parts += [f"it names {extra[0]}, which the model does not have"] if extra else []
        raise MoeqError(f"the plan belongs to another model: {' and '.join(parts)}")
    for layer in layers:
        listed = plan.expert_bits[layer.container].num_experts
        if listed != layer.num_experts:
            raise MoeqError(
                f"the plan belongs to another model: {layer.container} has {layer.num_experts} "
                f"experts, the plan lists {listed}"
            )
    check_group_size(plan.group_size, layers)


def check_group_size(group_size: int, layers: list[MoELayer]) -> None:
    """Check that a group size exists and that experts can be packed with it.

    Raises:
        MoeqError: They cannot; says what would work.
    """
    if group_size not in GROUP_SIZES:
        choices = ", ".join(map(str, GROUP_SIZES))
        raise MoeqError(f"`group_size` {group_size} is not one of {choices}")
    for layer in layers:
        hidden, inner = layer.hidden_size, layer.intermediate_size
        if hidden % group_size:
            fitting = [group for group in reversed(GROUP_SIZES) if hidden % group == 0]
            hint = f"use `group_size` {fitting[0]}" if fitting else _NONE_FITS
            raise MoeqError(
                f"`group_size` {group_size} does not divide the hidden_size {hidden} of "
                f"{layer.container}; {hint}"
            )
        if inner % CODES_PER_WORD:
            raise MoeqError(
                f"the intermediate_size {inner} of {layer.container} is no multiple of "
                f"{CODES_PER_WORD}: its experts cannot be packed with any group size. Pad them "
                f"with zeros to {inner + -inner % CODES_PER_WORD} in the source (rows of gate and "
                "up, columns of down), and say so in config.json"
            )


def fitting_group_size(layers: list[MoELayer]) -> int:
    """Return the group size with which experts take the least memory when they are served.

    Small groups have more scales, large ones more zeros at the end of a row.

    Raises:
        MoeqError: None divides the rows of gate and up.
    """
    hidden_sizes = {layer.hidden_size for layer in layers}
    fitting = [group for group in GROUP_SIZES if not any(size % group for size in hidden_sizes)]
    if not fitting:
        raise MoeqError(f"hidden_size {min(hidden_sizes)} of {layers[0].container}: {_NONE_FITS}")

    def served_bits(group_size: int) -> float:
        columns = sum(layer.intermediate_size + layer.added_columns(group_size) for layer in layers)
        return columns * (_USUAL_BITS + _BITS_OF_A_GROUP / group_size)

    return min(fitting, key=served_bits)
