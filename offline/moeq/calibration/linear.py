"""Rounds the dense layers of a decoder layer, in the order in which they run."""

from itertools import groupby

import torch

from moeq.calibration.config import CalibrationConfig
from moeq.calibration.snapshots import Tensors
from moeq.model import LayerwiseModel, LinearInputs


def round_linear_layers(
    config: CalibrationConfig,
    model: LayerwiseModel,
    index: int,
    hidden: torch.Tensor,
) -> tuple[Tensors, Tensors]:
    """Round the dense layers that the plan names, each by what it gets behind rounded ones.

    Args:
        config: What to round, and how.
        model: Runs the layer.
        index: Which decoder layer; or what a group of embeddings has in its place.
        hidden: float32 [n, L, hidden_size]: its input, which stays as it is.

    Returns:
        The rounded weights, float32, by name; and what is stored of them, by name.

    Raises:
        MoeqError: A weight cannot be quantized; names it.
    """
    widths = config.linear
    planned = [group for group in widths if group.layer == index]
    weights: Tensors = {}
    stored: Tensors = {}
    for _, stage in groupby(sorted(planned, key=lambda g: g.stage), key=lambda g: g.stage):
        groups = list(stage)
        inputs = LinearInputs(model, groups)
        if inputs.watch:
            model.watch(index, hidden, weights, inputs.watch)
        for group in groups:
            sizes = [config.plan.group_size]
            for name, bits, _, rounded in inputs.rounded(group, [widths[group]], sizes):
                weights[name] = rounded.dequantize(bits)
                stored |= rounded.to("cpu").named(name)
    return weights, stored
