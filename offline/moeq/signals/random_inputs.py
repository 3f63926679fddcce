"""What rounding an expert does to its output when there is no text: on random inputs."""

import torch

from moeq.checkpoint import MoELayer
from moeq.model import LayerwiseModel
from moeq.rounding import quantize_rtn

TOKENS = 512
"""Random inputs; the same ones for every expert."""


def data_free_error(
    model: LayerwiseModel, layer: MoELayer, bits: int, group_size: int
) -> torch.Tensor:
    """Return the error of each expert's output on random inputs, float32 [num_experts].

    The mean squared change when all its weights are rounded to nearest. Inputs are what the norm in
    front of the experts, if there is one, gives for standard normal numbers.

    Args:
        model: Runs the checkpoint.
        layer: One of its MoE layers.
        bits: Width.
        group_size: Weights of a row that share a scale.

    Raises:
        MoeqError: Weights that are not finite, or a norm that is missing; names the tensor.
    """
    x = torch.randn(TOKENS, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    x = model.normalized(layer, x.to(model.device))

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        return quantize_rtn(weight, bits, group_size).dequantize(bits, group_size).to(model.device)

    errors = []
    for expert in range(layer.num_experts):
        original = model.matrices(layer, expert)
        changed = original._replace(w13=rounded(original.w13), w2=rounded(original.w2))
        change = model.expert_output(changed, x) - model.expert_output(original, x)
        errors.append(change.square().mean())
    return torch.stack(errors)
