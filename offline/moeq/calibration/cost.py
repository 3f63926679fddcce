"""What a calibration takes: arithmetic, memory and disk."""

import math

import torch

from moeq.calibration.config import CalibrationConfig
from moeq.checkpoint import MoELayer
from moeq.checkpoint.sizes import plan_sizes
from moeq.model.cost import (
    Cost,
    at_once,
    experts_of_a_token,
    fit_operations,
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

STREAMS, _SAVED = 4, 2
"""Activations of all tokens that the system keeps in memory or in files, and in each snapshot."""


def calibration_cost(config: CalibrationConfig) -> Cost:
    """Estimate what a calibration takes."""
    layers = config.source.layers
    largest, workers = _largest(config), at_once(layers, torch.device(config.device))
    steps = sum(
        math.ceil(layer.num_experts / config.batch_size(layer)) * gptq_steps(layer)
        for layer in layers
    )
    memory = _stream_bytes(config) + max(
        _worker_bytes(config, workers), linear_working_bytes(config.linear)
    )
    items = math.ceil(largest.num_experts / config.batch_size(largest))
    alone = _alone(config)
    return Cost(
        alone + _shared(config),
        alone,
        steps,
        memory,
        _worker_bytes(config, 1),
        _disk_bytes(config),
        workers,
        items,
        (largest.hidden_size, largest.intermediate_size),
    )


def _shared(config: CalibrationConfig) -> float:
    """Return the operations of experts, which workers share."""
    layers, tokens = config.source.layers, config.tokens.numel()
    routed = experts_of_a_token(config.source, layers[0])
    choices = layers[0].num_experts if config.route_all else routed
    forward = forward_operations(layers[0])
    # By router: the original model, and its experts in the rounded one. By choice: rounded
    # ones, and their originals where these are other tokens than the router's.
    passes: float = len(layers) * (2 * routed + choices) * forward
    if config.route_all:
        passes += len(layers) * choices * forward
    passes += len(layers) * choices * hessian_operations(layers[0])
    samples = tokens * choices / layers[0].num_experts
    fits = sum(layer.num_experts * fit_operations(layer, samples) for layer in layers)
    return gptq_operations(layers) + tokens * passes + fits


def _alone(config: CalibrationConfig) -> float:
    """Return the operations of all other layers."""
    tokens = config.tokens.numel()
    # Dense layers are watched once for each stage of a layer, which runs as far as that.
    stages = len({group.stage for group in config.linear})
    watched = (stages + 1) / 2 if stages else 0
    passes = (2 + watched) * other_operations(config.source, config.tokens.shape[1])[0]
    return tokens * passes + linear_operations(config.linear, 1, tokens)


def _largest(config: CalibrationConfig) -> MoELayer:
    return max(config.source.layers, key=working_bytes)


def _worker_bytes(config: CalibrationConfig, workers: int) -> int:
    """Return what so many workers take together."""
    largest = _largest(config)
    hidden, inner = largest.hidden_size, largest.intermediate_size
    size = config.batch_size(largest)
    # All tokens may choose the same experts.
    routed = experts_of_a_token(config.source, largest)
    most = largest.num_experts if config.route_all else routed
    inputs = min(size, most) * config.input_bytes(largest)
    one = 4 * config.tokens.numel() * (hidden + 2 * inner)
    times = tokens_of_experts(workers, most, largest.num_experts)
    return round(times * (inputs + one)) + workers * size * working_bytes(largest)


def _activation_bytes(config: CalibrationConfig) -> int:
    """Return the bytes of the hidden states of all tokens."""
    return 4 * config.tokens.numel() * config.source.hidden_size


def _stream_bytes(config: CalibrationConfig) -> int:
    """Return the bytes of all activations that are kept."""
    source = config.source
    # Where a norm follows experts, their sums are apart from the hidden states.
    apart = 2 if source.layers[0].family.normalized else 0
    # And what the experts of a layer add, before it is summed up.
    shares = experts_of_a_token(source, source.layers[0])
    return (STREAMS + apart + shares) * _activation_bytes(config)


def _disk_bytes(config: CalibrationConfig) -> int:
    """Return the bytes of finished layers, activations and their snapshots."""
    packed = plan_sizes(config.plan, config.source).expert_bytes
    packed += sum(
        group.num_bytes(bits, config.plan.group_size) for group, bits in config.linear.items()
    )
    return packed + _stream_bytes(config) + 2 * _SAVED * _activation_bytes(config)
