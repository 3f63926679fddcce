"""Compares sets of experts with the model's own."""

from collections.abc import Sequence

import torch

from moeq.evaluation.reference import outputs
from moeq.evaluation.scores import Evaluation, Scorer
from moeq.model import ExpertSource, LayerwiseModel
from moeq.model.sequences import answered
from moeq.progress import Progress, silent

PLANS_AT_ONCE = 12
"""That are judged together: activations of all of them are in memory."""


def judge(
    model: LayerwiseModel,
    sources: Sequence[ExpertSource],
    sequences: dict[str, torch.Tensor],
    progress: Progress = silent,
) -> list[Evaluation]:
    """Compare sets of experts with the model's own, on the same text, some at a time.

    Args:
        model: The model.
        sources: Sets of experts.
        sequences: Text to its tokens, int64 [n, L], all of one length L.
        progress: Called after every layer.
    """
    names = [name for name, tokens in sequences.items() for _ in tokens]
    tokens = torch.cat(list(sequences.values()))
    evaluations: list[Evaluation] = []
    for first in range(0, len(sources), PLANS_AT_ONCE):
        some = sources[first : first + PLANS_AT_ONCE]
        scorers = [Scorer() for _ in some]
        answers = outputs(model, [ExpertSource.original(model), *some], tokens, progress)
        for name, sequence, (original, *quantized) in zip(names, tokens, answers, strict=True):
            places = answered(model.source.reader.config, sequence)
            for scorer, output in zip(scorers, quantized, strict=True):
                scorer.add(name, sequence[places], original, output)
        evaluations += [scorer.result() for scorer in scorers]
    return evaluations
