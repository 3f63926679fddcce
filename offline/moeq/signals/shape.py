"""What the weights of an expert look like: data-free signals beside MaxVar."""

from collections.abc import Callable

import torch

from moeq.checkpoint import MoELayer, SourceModel
from moeq.errors import MoeqError


def kurtosis(source: SourceModel, layer: MoELayer) -> torch.Tensor:
    """Return the kurtosis of each expert's weights, float32 [num_experts]; 3 for a normal law.

    The mean over its matrices. Outliers, which make it large, widen the grids of all others.

    Raises:
        MoeqError: Weights that are not finite; names the tensor.
    """

    def of_matrix(weight: torch.Tensor) -> torch.Tensor:
        centred = weight - weight.mean()
        fourth = centred.pow(4).mean()
        result: torch.Tensor = fourth / centred.pow(2).mean().square()
        return result

    return torch.stack([_mean(source, layer, e, of_matrix) for e in range(layer.num_experts)])


def hill_alpha(source: SourceModel, layer: MoELayer) -> torch.Tensor:
    """Return the power-law exponent of each expert's spectra, float32 [num_experts].

    Hill's estimator over the upper half of the eigenvalues of W W^T (Martin and Mahoney, JMLR
    2021; median cut as in Lu et al., "AlphaPruning", 2024), the mean over its matrices. Small
    means heavy tails: an expert that has learned more.

    Raises:
        MoeqError: Weights that are not finite; names the tensor.
    """

    def of_matrix(weight: torch.Tensor) -> torch.Tensor:
        eigenvalues = torch.linalg.svdvals(weight).square().flip(0)  # ascending
        cut = len(eigenvalues) // 2
        tail = (eigenvalues[cut:] / eigenvalues[cut - 1]).log()
        result: torch.Tensor = 1 + len(tail) / tail.sum()
        return result

    return torch.stack([_mean(source, layer, e, of_matrix) for e in range(layer.num_experts)])


def _mean(
    source: SourceModel,
    layer: MoELayer,
    expert: int,
    function: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    values = []
    for matrix in (matrix for matrices in layer.projections.values() for matrix in matrices):
        name = layer.tensor_name(expert, matrix)
        value = function(source.tensor(name).float())
        if not torch.isfinite(value):
            raise MoeqError(f"{name} holds NaN or infinite weights, or none but zeros")
        values.append(value)
    return torch.stack(values).mean()
