"""Scores against formulas in float64."""

import numpy as np
import pytest
import torch

from moeq.errors import MoeqError
from moeq.evaluation.scores import Output, Scorer, Scores, TopOutput

L, V = 12, 20


def _logits(seed: int) -> torch.Tensor:
    return torch.randn(L, V, generator=torch.Generator().manual_seed(seed)) * 2


def _probabilities(logits: torch.Tensor) -> np.ndarray:
    exponents = np.exp(logits.double().numpy())
    return exponents / exponents.sum(-1, keepdims=True)


def _tokens() -> torch.Tensor:
    return torch.randint(V, (L,), generator=torch.Generator().manual_seed(9))


def _top(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> TopOutput:
    log_probabilities = logits.log_softmax(-1)[:-1]
    values, top = log_probabilities.topk(count)
    return TopOutput(top, values, log_probabilities.gather(1, tokens[1:, None]))


def _scores(found: Output | TopOutput) -> Scores:
    scorer = Scorer()
    scorer.add("text", _tokens(), Output.of(_logits(0), {}), found)
    return scorer.result().texts["text"]


def test_scores_of_a_sequence() -> None:
    p, q, tokens = _probabilities(_logits(0)), _probabilities(_logits(1)), _tokens().numpy()
    scores = _scores(Output.of(_logits(1), {}))
    places = np.arange(L - 1)
    assert scores.tokens == L - 1
    assert scores.loss == pytest.approx(-np.log(q[places, tokens[1:]]).mean())
    assert scores.original_loss == pytest.approx(-np.log(p[places, tokens[1:]]).mean())
    assert scores.divergence == pytest.approx((p * np.log(p / q))[:-1].sum(-1).mean())
    same = p[:-1].argmax(-1) == q[:-1].argmax(-1)
    assert scores.agreement == pytest.approx(same.mean())
    assert scores.perplexity == pytest.approx(np.exp(scores.loss))


def test_a_model_does_not_diverge_from_itself() -> None:
    scores = _scores(Output.of(_logits(0), {}))
    assert scores.divergence == pytest.approx(0, abs=1e-6)
    assert scores.agreement == 1
    assert scores.loss == scores.original_loss


def test_likeliest_tokens_alone_give_a_lower_bound_of_the_divergence() -> None:
    full = _scores(Output.of(_logits(1), {}))
    bounds = [_scores(_top(_logits(1), _tokens(), count)) for count in (1, 5, V - 1)]
    divergences = [bound.divergence for bound in bounds]
    assert 0 < divergences[0] < divergences[1] < divergences[2]
    assert divergences[2] == pytest.approx(full.divergence, rel=1e-3)
    for bound in bounds:
        assert bound.loss == pytest.approx(full.loss)
        assert bound.agreement == full.agreement


def test_texts_count_by_their_tokens() -> None:
    parts = [Scores(10, 1.0, 0.5, 0.1, 0.9), Scores(30, 2.0, 1.5, 0.3, 0.5)]
    mean = Scores.mean(parts)
    assert mean.tokens == 40
    assert (mean.loss, mean.original_loss) == (1.75, 1.25)
    assert mean.divergence == pytest.approx(0.25)
    assert mean.agreement == pytest.approx(0.6)


def test_routing_shift_counts_choices_that_are_not_made_any_more() -> None:
    scorer = Scorer()
    original = {"layer": torch.tensor([[0, 1], [2, 3]])}
    found = {"layer": torch.tensor([[1, 0], [3, 4]])}  # another order is no shift
    logits = _logits(0)[:2]
    scorer.add("text", _tokens()[:2], Output.of(logits, original), Output.of(logits, found))
    assert scorer.result().routing_shift == {"layer": 0.25}


def test_values_that_are_not_finite_are_refused() -> None:
    logits = _logits(1)
    logits[3, 4] = torch.nan
    with pytest.raises(MoeqError, match="NaN or infinity on the text text"):
        _scores(Output.of(logits, {}))
