"""Signals from the shape of weights, against scipy and a loop over eigenvalues."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis as scipy_kurtosis

from moeq.checkpoint import SourceModel
from moeq.errors import MoeqError
from moeq.signals.shape import hill_alpha, kurtosis
from support.checkpoints import CONTAINERS, NUM_EXPERTS, mixtral_tensors, write_checkpoint

MATRICES = ("w1", "w3", "w2")


def test_kurtosis(tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    name = f"{CONTAINERS[0]}.2.w1.weight"
    tensors[name][3, 4] = 50  # an outlier
    source = SourceModel.open(write_checkpoint(tmp_path, tensors))
    found = kurtosis(source, source.layers[0])
    for expert in range(NUM_EXPERTS):
        matrices = (tensors[f"{CONTAINERS[0]}.{expert}.{m}.weight"] for m in MATRICES)
        values = [scipy_kurtosis(m.double().numpy(), axis=None, fisher=False) for m in matrices]
        assert found[expert].item() == pytest.approx(np.mean(values), rel=1e-3)
    assert found.argmax() == 2


def test_hill_alpha(tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    source = SourceModel.open(write_checkpoint(tmp_path, tensors))
    found = hill_alpha(source, source.layers[1])
    for expert in range(NUM_EXPERTS):
        values = []
        for matrix in MATRICES:
            weight = tensors[f"{CONTAINERS[1]}.{expert}.{matrix}.weight"].double().numpy()
            gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
            eigenvalues = sorted(np.linalg.eigvalsh(gram), reverse=True)
            half = len(eigenvalues) // 2
            total = sum(math.log(value / eigenvalues[half]) for value in eigenvalues[:half])
            values.append(1 + half / total)
        assert found[expert].item() == pytest.approx(np.mean(values), rel=1e-3)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    name = f"{CONTAINERS[0]}.1.w3.weight"
    tensors[name][0, 0] = torch.nan
    source = SourceModel.open(write_checkpoint(tmp_path, tensors))
    with pytest.raises(MoeqError, match=f"{name} holds NaN"):
        kurtosis(source, source.layers[0])
