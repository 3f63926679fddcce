"""Moves weights, before they are rounded, to where their output comes nearest to a wanted one.

GPTQ keeps the output of a matrix on the inputs that it gets in the quantized model. What earlier
matrices and layers have done to those inputs stays as an error, unless a matrix is fitted first to
what the ORIGINAL model has in its place: the idea of Li et al., "GPTAQ" (2025), and Arai and
Ichikawa, "Quantization Error Propagation" (2025), here as one least-squares step before any
rounding. ``moeq.calibration`` does it for the down projections, whose outputs end in the residual
stream: wanted is what brings the stream back to where it is in the original model.
"""

import torch

from moeq.rounding.gptq import Hessian


def fitted(weights: torch.Tensor, hessian: Hessian, missing: torch.Tensor) -> torch.Tensor:
    """Return the weights whose outputs come nearest to wanted ones, by damped least squares.

    The damping is that of the Hessians, so few samples move the weights little; and their factors
    serve twice, here and in the rounding.

    Args:
        weights: float32 [B, N, K].
        hessian: Of their inputs.
        missing: Sums of the outer products of what the outputs lack, wanted - output, and the
            inputs: float32 [B, N, K].
    """
    order, factor = hessian.order[:, None].expand_as(missing), hessian.factor
    # missing times the inverse of R R^T, with the columns in that order.
    change = torch.linalg.solve_triangular(
        factor.mT, missing.gather(2, order), upper=False, left=False
    )
    change = torch.linalg.solve_triangular(factor, change, upper=True, left=False)
    return weights + torch.empty_like(change).scatter_(2, order, change)
