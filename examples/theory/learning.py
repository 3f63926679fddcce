"""What the router norm change says in the course of training."""

from dataclasses import dataclass

import torch
from setting import (
    Setting,
    answers,
    draw_test,
    initial_weights,
    margins,
    mean_where,
    norm_change,
    rare_first_auc,
    train,
)

RATES = (0.05, 0.1, 0.2, 0.5)
"""Probabilities of the rare patterns; at 0.5 none is rare."""
STOPS = (12, 25, 50, 100, 200, 400, 800, 1600)
"""Steps at which training is looked at."""


@dataclass(frozen=True, slots=True)
class Learning:
    """What training led to at each of ``STOPS`` for each of ``RATES``.

    Attributes:
        auc: [stops, rates, runs].
        rare_margin: Mean margin of rare sequences, of the same shape.
        frequent_margin: The same of frequent ones.
        change: Lambda [stops, rates, runs, experts].
        own_answer: What an expert answers to its own pattern, of the same shape.
    """

    auc: torch.Tensor
    rare_margin: torch.Tensor
    frequent_margin: torch.Tensor
    change: torch.Tensor
    own_answer: torch.Tensor


def measure_learning(runs: int, setting: Setting, seed: int) -> Learning:
    """Train ``runs`` models for each of ``RATES`` and look at them at each of ``STOPS``."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.tensor(RATES).repeat_interleave(runs)
    start = initial_weights(len(rate), setting, generator)
    test = draw_test(len(rate), setting, generator)
    specialised = torch.arange(setting.experts)
    rows = []
    for weights in train(start, rate, setting, STOPS, generator):
        change = norm_change(start, weights)
        margin = margins(weights, test, setting)
        own = answers(weights.experts)[:, specialised, setting.own_pattern]
        auc = rare_first_auc(change, setting)
        rows.append(
            (auc, mean_where(test.rare, margin), mean_where(~test.rare, margin), change, own)
        )
    return Learning(
        *(torch.stack(part).unflatten(1, (len(RATES), runs)) for part in zip(*rows, strict=True))
    )


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return Spearman's rank correlation of two tensors of the same shape without ties."""
    ranks = [values.flatten().argsort().argsort().float() for values in (first, second)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()
