"""How many bytes experts take at which widths, and what a plan comes to."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeq.checkpoint.families import MoELayer
from moeq.checkpoint.linear import group_widths
from moeq.checkpoint.source import SourceModel
from vllm_moeq.format import BitPlan, packed_bytes


class PlanSizes(NamedTuple):
    """Sizes that a plan leads to.

    Attributes:
        expert_weights: Number of routed expert weights.
        achieved_bits: Average nominal width.
        bits_per_weight: The same with scales and zero points.
        expert_bytes: Bytes of all packed experts.
        total_bytes: The same with all other tensors.
    """

    expert_weights: int
    achieved_bits: float
    bits_per_weight: float
    expert_bytes: int
    total_bytes: int


def plan_sizes(plan: BitPlan, source: SourceModel) -> PlanSizes:
    """Return the sizes that a plan leads to for a model that it fits."""
    weights = code_bits = size = 0
    for layer in source.layers:
        bits = plan.expert_bits[layer.container]
        for expert, matrix, projection in layer.weights():
            rows, columns = layer.shape(matrix)
            width = bits.width(projection, expert)
            weights += rows * columns
            code_bits += rows * columns * width
            size += packed_bytes(rows, columns, width, plan.group_size)
    saved = sum(
        group.full_bytes - group.num_bytes(bits, plan.group_size)
        for group, bits in group_widths(plan, source.linear).items()
    )
    total = size + source.other_bytes - saved
    return PlanSizes(weights, code_bits / weights, size * 8 / weights, size, total)


def served_bytes(plan: BitPlan, source: SourceModel) -> int:
    """Return the bytes of all packed experts in memory, where the last group of a row is whole.

    They are the same for any number of tensor-parallel ranks, which share out whole groups.

    Args:
        plan: Fits the model.
        source: The model.
    """
    size = 0
    for layer in source.layers:
        bits = plan.expert_bits[layer.container]
        inner = layer.intermediate_size + layer.added_columns(plan.group_size)
        served = replace(layer, intermediate_size=inner)
        for expert, matrix, projection in served.weights():
            width = bits.width(projection, expert)
            size += packed_bytes(*served.shape(matrix), width, plan.group_size)
    return size


def with_sizes(plan: BitPlan, source: SourceModel) -> BitPlan:
    """Return a plan that fits a model with the true sizes in its provenance."""
    sizes = plan_sizes(plan, source)
    provenance = replace(
        plan.provenance,
        achieved_bits=sizes.achieved_bits,
        bits_per_weight=sizes.bits_per_weight,
        expert_bytes=sizes.expert_bytes,
        total_bytes=sizes.total_bytes,
    )
    return replace(plan, provenance=provenance)


def option_sizes(
    layers: list[MoELayer], group_size: int, widths: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """Return the packed bytes of every projection at every width, with scales and zero points.

    Args:
        layers: MoE layers of a model.
        group_size: Weights of a row that share a scale.
        widths: Bits per weight.

    Returns:
        int64 [items, widths]; items are ordered by layer, expert and projection (w13, w2).

    Raises:
        FormatError: The group size does not divide a row, or an unknown width.
    """
    blocks = []
    for layer in layers:
        # All experts of a layer have the same shapes.
        size = [
            [
                sum(packed_bytes(*layer.shape(matrix), width, group_size) for matrix in matrices)
                for width in widths
            ]
            for matrices in layer.projections.values()
        ]
        blocks.append(np.tile(np.array(size, np.int64), (layer.num_experts, 1)))
    return np.concatenate(blocks)
