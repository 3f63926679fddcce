"""Moves weights, before they are rounded, to where their output comes nearest to a wanted one.

GPTQ keeps the output of a matrix on the inputs that it gets in the quantized model. What earlier
matrices and layers have done to those inputs stays as an error, unless a matrix is fitted first to
what the ORIGINAL model has in its place: the idea of Li et al., "GPTAQ" (2025), and Arai and
Ichikawa, "Quantization Error Propagation" (2025), here as one least-squares step before any
rounding. ``moeq.calibration`` does it for the down projections, whose outputs end in the residual
stream: wanted is what brings the stream back to where it is in the original model.
"""

from collections.abc import Sequence

import torch

from moeq.rounding.gptq import Hessian, gram


def fitted(
    weights: torch.Tensor,
    hessian: Hessian,
    wanted: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the weights whose outputs come nearest to wanted ones, by damped least squares.

    The damping is that of the Hessians, so few samples move the weights little. With fewer samples
    than columns the problem is solved in the samples, else with the factors, which serve twice:
    here and in the rounding.

    Args:
        weights: float32 [B, N, K].
        hessian: Of their inputs.
        wanted: Outputs, float32 [n, N] each; n differs.
        inputs: float32 [n, K] each.
    """
    solved = torch.empty_like(weights)
    for b, (outputs, x) in enumerate(zip(wanted, inputs, strict=True)):
        old, damping = weights[b], hessian.damping[b]
        if len(x) < x.shape[1]:
            lack = outputs - x @ old.T
            torch.addmm(old, _of_samples(lack, x, damping).T, x, out=solved[b])
        else:  # of what old weights give, H without its damping has the products with inputs
            lack = torch.addmm(outputs.T @ x, old, hessian.damped[b], alpha=-1)
            lack.addcmul_(old, damping)
            change = _of_columns(lack, hessian.factor[b], hessian.order[b])
            torch.add(old, change, out=solved[b])
    return solved


def _of_samples(lack: torch.Tensor, x: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """Return (X X^T + damping)^-1 times what the outputs lack: [n, N]."""
    products = gram(x.T)
    products.diagonal().add_(damping)
    return torch.cholesky_solve(lack, torch.linalg.cholesky(products))


def _of_columns(missing: torch.Tensor, factor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return a matrix [N, K] times the inverse of R R^T, whose columns are in that order."""
    change = torch.linalg.solve_triangular(factor.T, missing[:, order], upper=False, left=False)
    change = torch.linalg.solve_triangular(factor, change, upper=True, left=False)
    return torch.empty_like(change).index_copy_(1, order, change)
