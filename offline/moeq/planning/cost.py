"""What measuring a plan takes: arithmetic, memory and disk."""

from collections import Counter

from moeq.checkpoint import MoELayer, SourceModel
from moeq.checkpoint.servable import text_config
from moeq.checkpoint.sizes import option_sizes
from moeq.errors import MoeqError
from moeq.model.cost import (
    Cost,
    at_once,
    experts_of_a_token,
    forward_operations,
    gptq_operations,
    gptq_steps,
    hessian_operations,
    linear_operations,
    linear_working_bytes,
    other_operations,
    tokens_of_experts,
    working_bytes,
)
from moeq.model.layerwise import TOKENS_AT_ONCE
from moeq.planning.judge import PLANS_AT_ONCE
from moeq.planning.measurement import Measurement
from moeq.rounding import DATA_FREE


def measuring_cost(measurement: Measurement) -> Cost:
    """Estimate what a measurement takes."""
    layers, largest = measurement.source.layers, _largest(measurement)
    workers, alone = at_once(layers, measurement.device), _alone(measurement)
    return Cost(
        alone + _shared(measurement),
        alone,
        _steps(measurement),
        _memory_bytes(measurement, workers),
        _worker_bytes(measurement, 1),
        _disk_bytes(measurement),
        workers,
        max(layer.num_experts for layer in layers),
        (largest.hidden_size, largest.intermediate_size),
    )


def _shared(measurement: Measurement) -> float:
    """Return the operations of the bank, which workers share."""
    layers, widths = measurement.source.layers, len(measurement.widths)
    groups, tokens = len(measurement.group_sizes), measurement.measured.numel()
    routed = experts_of_a_token(measurement.source, layers[0]) * len(layers)
    # Each expert, and each of its projections at each width.
    runs = tokens * groups * (1 + 4 / 3 * widths) * routed * forward_operations(layers[0])
    if measurement.method in DATA_FREE:
        return runs
    hessians = tokens * routed * hessian_operations(layers[0])
    return runs + groups * (hessians + gptq_operations(layers, widths))


def _alone(measurement: Measurement) -> float:
    """Return the operations on the way forward and back, of dense layers and judging."""
    source, tokens = measurement.source, measurement.measured.numel()
    routed = experts_of_a_token(source, source.layers[0]) * len(source.layers)
    experts = routed * forward_operations(source.layers[0])
    other, head = other_operations(source, measurement.tokens.shape[1])
    # Forward for the gradients, forward and back.
    total = tokens * (4 * (experts + other) + 3 * head)
    plans = 1 + PLANS_AT_ONCE
    total += plans * measurement.held_back.numel() * (experts + other + head)
    # Dense layers: once more forward, rounded, and on the way back with each error.
    if measurement.linear and measurement.method not in DATA_FREE:
        options = len(measurement.group_sizes) * len(measurement.linear_widths)
        errors = sum(2 * group.rows * group.columns for group in measurement.linear)
        total += linear_operations(measurement.linear, options, tokens)
        total += tokens * (other + options * errors)
    return total


def _steps(measurement: Measurement) -> float:
    """Return the columns that GPTQ visits one after another."""
    if measurement.method in DATA_FREE:
        return 0
    times = len(measurement.widths) * len(measurement.group_sizes)
    layers = measurement.source.layers
    return times * sum(layer.num_experts * gptq_steps(layer) for layer in layers)


def _largest(measurement: Measurement) -> MoELayer:
    return max(measurement.source.layers, key=lambda layer: layer.expert_weights)


def _worker_bytes(measurement: Measurement, workers: int) -> int:
    """Return what so many workers take together."""
    layer = _largest(measurement)
    columns = 16 * layer.hidden_size + 12 * layer.intermediate_size
    inputs = measurement.measured.numel() * columns
    top_k = experts_of_a_token(measurement.source, layer)
    times = tokens_of_experts(workers, top_k, layer.num_experts)
    return workers * working_bytes(layer) + round(times * inputs)


def _memory_bytes(measurement: Measurement, workers: int) -> int:
    """Return the peak of the memory: of measuring with so many workers, or of judging."""
    layer, measured = _largest(measurement), measurement.measured
    hidden_bytes = 4 * layer.hidden_size
    streams = 4 * measured.numel() * hidden_bytes
    rounding = max(_worker_bytes(measurement, workers), linear_working_bytes(measurement.linear))
    judging = 2 * (1 + PLANS_AT_ONCE) * measurement.held_back.numel() * hidden_bytes
    return max(streams + max(_gradient_bytes(measurement), rounding), judging)


def _gradient_bytes(measurement: Measurement) -> int:
    """Return what the way back through a layer takes."""
    layer, length = _largest(measurement), measurement.measured.shape[1]
    # All experts, in float32, and what those of some tokens compute.
    experts = 4 * layer.num_experts * layer.expert_weights
    routed = max(TOKENS_AT_ONCE, length) * experts_of_a_token(measurement.source, layer)
    experts += 4 * routed * (2 * layer.hidden_size + 4 * layer.intermediate_size)
    # Beside them the dense layers, and all their errors.
    weights = Counter[int]()
    for group in measurement.linear:
        weights[group.layer] += group.rows * group.columns
    options = len(measurement.group_sizes) * len(measurement.linear_widths)
    return experts + 4 * (1 + options) * max(weights.values(), default=0)


def _disk_bytes(measurement: Measurement) -> int:
    """Return the bytes of experts and dense layers at every width, and of activations."""
    group_sizes = measurement.group_sizes
    tokens = measurement.measured.numel()
    experts = measuring_bytes(measurement.source, measurement.widths, group_sizes, tokens)
    return experts + sum(
        group.num_bytes(bits, group_size)
        for group in measurement.linear
        for bits in measurement.linear_widths
        for group_size in group_sizes
    )


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
