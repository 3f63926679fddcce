"""Fitted weights against least squares in float64."""

import pytest
import torch

from moeq.rounding import Hessian, fitted


@pytest.mark.parametrize("samples", [10, 40, 4000])  # fewer than columns, and more
def test_fitted_weights_solve_the_damped_least_squares(samples: int) -> None:
    batch, rows, columns = 3, 5, 16
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # Columns of uneven size, so that the order of work is not theirs.
    x = random(batch, samples, columns) * random(columns).exp()
    weights, wanted = random(batch, rows, columns), random(batch, samples, rows)
    curvature = Hessian.of(x.mT @ x, [samples] * batch)
    found = fitted(weights, curvature, list(wanted), list(x))
    damping = max(0.01, 0.5 * columns / samples)
    for b in range(batch):
        inputs, old = x[b].double(), weights[b].double()
        strength = (damping * inputs.square().sum(0).mean()).sqrt()
        # The damping as further samples, whose wanted output is that of the old weights.
        inputs = torch.cat((inputs, strength * torch.eye(columns).double()))
        outputs = torch.cat((wanted[b].double(), strength * old.T))
        solution = torch.linalg.lstsq(inputs, outputs).solution.T
        assert torch.allclose(found[b].double(), solution, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("samples", [6, 100])
def test_weights_that_lack_nothing_stay(samples: int) -> None:
    x, weights = torch.randn(2, samples, 8), torch.randn(2, 4, 8)
    curvature = Hessian.of(x.mT @ x, [samples] * 2)
    found = fitted(weights, curvature, list(x @ weights.mT), list(x))
    assert torch.allclose(found, weights, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_zero_leave_the_weights() -> None:
    x, weights = torch.zeros(1, 6, 8), torch.randn(1, 4, 8)
    curvature = Hessian.of(x.mT @ x, [6])
    assert torch.equal(fitted(weights, curvature, [torch.randn(6, 4)], [x[0]]), weights)
