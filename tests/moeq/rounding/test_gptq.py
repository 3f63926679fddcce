"""GPTQ against a float64 textbook implementation and exhaustive search."""

import itertools

import numpy as np
import pytest
import torch

from moeq.rounding import REFINEMENT, QuantizedWeight, quantize_gptq, quantize_rtn
from moeq.rounding.gptq import Hessian, Refinement, gram
from support.reference import dequantize

N, K, GROUP = 24, 256, 64
MANY = 10**6  # samples: no more damping than the textbook has
PLAIN = Refinement(rounds=0, in_feedback=0)


def _inputs(tokens: int = 1024, columns: int = K, seed: int = 0) -> np.ndarray:
    """Return inputs whose columns depend on each other and differ in size, as activations do."""
    source = np.random.default_rng(seed)
    mixed = source.normal(size=(tokens, columns)) @ source.normal(size=(columns, columns))
    low_rank = source.normal(size=(tokens, 8)) @ source.normal(size=(8, columns))
    sizes = np.exp(source.normal(size=columns))
    return (mixed / np.sqrt(columns) + 2 * low_rank) * sizes


def _weight(rows: int = N, columns: int = K, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)) / np.sqrt(columns)


def _objective(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    difference = quantized - weight
    return float(np.einsum("nk,kl,nl->", difference, hessian, difference))


def _quantized(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    samples: int,
    bits: int,
    group: int,
    refinement: Refinement = REFINEMENT,
) -> QuantizedWeight:
    """Quantize a batch of one."""
    curvature = Hessian.of(hessian.float()[None].clone(), [samples])
    (found,) = quantize_gptq(weight[None], curvature, bits, group, refinement)
    return found


def _stored(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    group: int = GROUP,
    refinement: Refinement = REFINEMENT,
) -> np.ndarray:
    """Return the weights as read back from the three stored tensors by other code."""
    found = _quantized(
        torch.from_numpy(weight), torch.from_numpy(hessian), MANY, bits, group, refinement
    )
    return dequantize(*found, group, bits).numpy()


def _textbook(weight: np.ndarray, hessian: np.ndarray, bits: int) -> np.ndarray:
    """GPTQ as published: activation order, static groups, min-max grids, 1 % damping."""
    w = weight.copy()
    levels = 2**bits - 1
    groups = np.split(weight, range(GROUP, weight.shape[1], GROUP), axis=1)
    low = np.stack([np.minimum(group.min(1), 0) for group in groups], 1)
    high = np.stack([np.maximum(group.max(1), 0) for group in groups], 1)
    scale = (high - low) / levels
    zero = np.rint(-low / scale)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    order = np.argsort(-np.diag(damped))
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    result = np.empty_like(w)
    for step, column in enumerate(order):
        s, z = scale[:, column // GROUP], zero[:, column // GROUP]
        code = np.clip(np.rint(w[:, column] / s + z), 0, levels)
        result[:, column] = (code - z) * s
        error = (w[:, column] - result[:, column]) / upper[step, step]
        w[:, order[step:]] -= np.outer(error, upper[step, step:])
    return result


@pytest.mark.parametrize("columns", [K, K - 16])  # whole groups, and a last one of 48
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_objective_is_not_above_the_textbook(bits: int, columns: int) -> None:
    x, weight = _inputs(columns=columns), _weight(columns=columns)
    hessian = x.T @ x
    textbook = _objective(weight, _textbook(weight, hessian, bits), hessian)
    assert _objective(weight, _stored(weight, hessian, bits), hessian) <= textbook
    # The refinements are not what makes the difference.
    assert _objective(weight, _stored(weight, hessian, bits, refinement=PLAIN), hessian) <= (
        1.05 * textbook
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_errors_are_fed_back_at_every_width(bits: int) -> None:
    x, weight = _inputs(), _weight()
    hessian = x.T @ x
    found = quantize_rtn(torch.from_numpy(weight), bits, GROUP)
    nearest = dequantize(*found, group_size=GROUP).numpy()
    plain = _stored(weight, hessian, bits, refinement=PLAIN)
    assert _objective(weight, plain, hessian) < 0.6 * _objective(weight, nearest, hessian)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_refinements_only_lower_the_objective(bits: int) -> None:
    x, weight = _inputs(), _weight()
    hessian = x.T @ x
    values = [
        _objective(weight, _stored(weight, hessian, bits, refinement=refinement), hessian)
        for refinement in (PLAIN, *(Refinement(n) for n in range(4)))
    ]
    # Up to the damping, which the refinements minimize too.
    assert all(b <= 1.002 * a for a, b in itertools.pairwise(values))
    assert values[-1] < 0.95 * values[0]


@pytest.mark.parametrize("seed", range(5))
def test_codes_are_close_to_an_exhaustive_search(seed: int) -> None:
    """All 2^10 codes of a row of 1 bit, on the grid that was found."""
    columns = 8
    x, weight = _inputs(64, columns, seed), _weight(6, columns, seed)
    hessian = x.T @ x
    found = _quantized(torch.from_numpy(weight), torch.from_numpy(hessian), MANY, 1, columns)
    scale = found.scale.double().numpy()
    zero = found.zero_point.double().numpy() * 2 / 256
    every = np.array(list(itertools.product((0, 1), repeat=columns)))
    best = 0.0
    for row in range(len(weight)):
        difference = (every - zero[row]) * scale[row] - weight[row]
        best += np.einsum("ck,kl,cl->c", difference, hessian, difference).min()
    ours = _objective(weight, dequantize(*found, group_size=columns).numpy(), hessian)
    assert best <= ours * (1 + 1e-6)
    assert ours <= 1.25 * best


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    weight = torch.from_numpy(_weight())
    for ours, nearest in zip(
        _quantized(weight, torch.eye(K), MANY, 3, GROUP, PLAIN),
        quantize_rtn(weight, 3, GROUP),
        strict=True,
    ):
        assert torch.equal(ours, nearest)


@pytest.mark.parametrize("samples", [16, 64, 256])
def test_few_samples_are_not_fitted_at_the_cost_of_other_inputs(samples: int) -> None:
    """Judged on inputs that were not seen, it is no worse than rounding to nearest."""
    x, weight = _inputs(4096), _weight()
    seen, unseen = x[:samples], x[2048:]
    found = _quantized(torch.from_numpy(weight), torch.from_numpy(seen.T @ seen), samples, 2, GROUP)
    nearest = quantize_rtn(torch.from_numpy(weight), 2, GROUP)
    hessian = unseen.T @ unseen
    ours, theirs = (
        _objective(weight, dequantize(*stored, group_size=GROUP).numpy(), hessian)
        for stored in (found, nearest)
    )
    assert ours < theirs


@pytest.mark.parametrize("kind", ["zero", "one token", "dead columns"])
def test_singular_hessians(kind: str) -> None:
    x, weight = _inputs(), _weight()
    x = {"zero": 0 * x, "one token": x[:1], "dead columns": x * (np.arange(K) % 3 > 0)}[kind]
    quantized = _stored(weight, x.T @ x, 3)
    assert np.isfinite(quantized).all()
    # Also what no token needs stays near.
    assert np.linalg.norm(quantized - weight) < 0.6 * np.linalg.norm(weight)


def test_a_hessian_that_rounding_made_indefinite_gets_more_damping() -> None:
    x, weight = _inputs(64), _weight()  # of rank 64
    hessian = x.T @ x
    hessian -= 0.03 * np.diag(hessian).mean() * np.eye(K)  # more than the first damping
    assert np.linalg.eigvalsh(hessian).min() < 0
    quantized = _stored(weight, hessian, 3)
    assert np.linalg.norm(quantized - weight) < 0.6 * np.linalg.norm(weight)


def test_activations_that_are_not_finite_are_refused() -> None:
    hessian = torch.eye(K)
    hessian[3, 3] = torch.nan
    with pytest.raises(ValueError, match="calibration activations are NaN or infinite"):
        _quantized(torch.randn(4, K), hessian, MANY, 2, GROUP)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.randn(4, K)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="weights are NaN, infinite"):
        _quantized(weight, torch.eye(K), MANY, 2, GROUP)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_matrices_of_a_batch_are_rounded_as_if_alone(bits: int) -> None:
    """Up to codes that flip, and what follows from them: sums are ordered differently."""
    weights = [_weight(seed=seed) for seed in range(3)]
    hessians = [x.T @ x for x in (_inputs(seed=seed) for seed in range(3))]
    samples = [MANY, MANY, 300]
    together = quantize_gptq(
        torch.from_numpy(np.stack(weights)),
        Hessian.of(torch.from_numpy(np.stack(hessians)).float(), samples),
        bits,
        GROUP,
    )
    objectives = []
    for weight, hessian, count, found in zip(weights, hessians, samples, together, strict=True):
        alone = _quantized(torch.from_numpy(weight), torch.from_numpy(hessian), count, bits, GROUP)
        objectives.append(
            [
                _objective(weight, dequantize(*stored, group_size=GROUP).numpy(), hessian)
                for stored in (found, alone)
            ]
        )
    together_all, alone_all = zip(*objectives, strict=True)
    np.testing.assert_allclose(together_all, alone_all, rtol=0.02)


@pytest.mark.parametrize("columns", [8, 1024, 1100, 2500])
def test_a_gram_matrix_is_that_in_float64(columns: int) -> None:
    x = torch.from_numpy(_inputs(20, columns)[:, :columns]).float()
    found = gram(x)
    expected = x.double().T @ x.double()
    scale = expected.diagonal().sqrt()
    assert ((found - expected) / (scale[:, None] * scale)).abs().max() < 1e-5
