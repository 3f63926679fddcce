"""What rounding an expert does to its output when there is no text: on random inputs."""

import torch
import torch.nn.functional as F

from moeq.checkpoint import CheckpointReader
from moeq.errors import MoeqError
from moeq.families import Matrix, MoELayer
from moeq.rounding import quantize_rtn

TOKENS = 512
"""Random inputs; the same ones for every expert."""
_NORM = "post_attention_layernorm.weight"


def data_free_error(
    reader: CheckpointReader, layer: MoELayer, bits: int, group_size: int
) -> torch.Tensor:
    """Return the error of each expert's output on random inputs, float32 [num_experts].

    The mean squared change when all its weights are rounded to nearest. What an expert gets was
    normalized, so inputs are standard normal, times the weights of the norm in front of the layer
    where the checkpoint has one.

    Args:
        reader: The checkpoint.
        layer: One of its MoE layers.
        bits: Width.
        group_size: Weights of a row that share a scale.

    Raises:
        MoeqError: Weights that are not finite; names the tensor.
    """
    # Takes seconds to import, which other commands should not wait for.
    from transformers.activations import ACT2FN

    activation = ACT2FN[reader.config.get("hidden_act", "silu")]
    x = torch.randn(TOKENS, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    norm = layer.container.removesuffix(layer.family.experts) + _NORM
    if norm in reader.tensors:
        x *= reader.tensor(norm).float()

    def output(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return F.linear(activation(F.linear(x, gate)) * F.linear(x, up), down)

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        return quantize_rtn(weight, bits, group_size).dequantize(bits)

    def finite(expert: int, matrix: Matrix) -> torch.Tensor:
        name = layer.tensor_name(expert, matrix)
        weight = reader.tensor(name).float()
        if not torch.isfinite(weight).all():
            raise MoeqError(f"{name} holds NaN or infinite weights")
        return weight

    errors = []
    for expert in range(layer.num_experts):
        gate, up, down = (finite(expert, matrix) for matrix in ("gate", "up", "down"))
        change = output(*map(rounded, (gate, up, down))) - output(gate, up, down)
        errors.append(change.square().mean())
    return torch.stack(errors)
