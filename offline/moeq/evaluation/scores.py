"""What is measured of a quantized model: how far its answers are from those of the original."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moeq.errors import MoeqError

Experts = Mapping[str, torch.Tensor]
"""Container of a layer's experts to the experts that its router chose, int64 [L, top_k]."""


class Output(NamedTuple):
    """What a model says to one sequence of L tokens.

    Attributes:
        log_probabilities: float32 [L, V], of the token that follows each token.
        experts: Of every MoE layer; empty if the backend does not tell.
    """

    log_probabilities: torch.Tensor
    experts: Experts

    @classmethod
    def of(cls, logits: torch.Tensor, experts: Experts) -> "Output":
        """Take logits [L, V]."""
        return cls(logits.float().log_softmax(-1), experts)


class TopOutput(NamedTuple):
    """What a server says: the likeliest tokens only.

    Attributes:
        tokens: int64 [L - 1, n], the likeliest first.
        log_probabilities: float32 [L - 1, n], of these tokens.
        next_token: float32 [L - 1, 1]: log-probability of the token that does follow.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor
    next_token: torch.Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over the predicted tokens of a text: all but the first of each sequence.

    Attributes:
        tokens: How many.
        loss: Negative log-likelihood in nats.
        original_loss: The same of the original model.
        divergence: Kullback-Leibler divergence from the original's distribution, in nats.
        agreement: Share of places where the likeliest token is the original's.
    """

    tokens: int
    loss: float
    original_loss: float
    divergence: float
    agreement: float

    @property
    def perplexity(self) -> float:
        """Of the quantized model."""
        return math.exp(self.loss)

    @classmethod
    def mean(cls, parts: Iterable["Scores"]) -> "Scores":
        """Return the scores of several texts together."""
        parts = list(parts)
        tokens = sum(part.tokens for part in parts)

        def average(name: str) -> float:
            return sum(part.tokens * float(getattr(part, name)) for part in parts) / tokens

        return cls(
            tokens,
            average("loss"),
            average("original_loss"),
            average("divergence"),
            average("agreement"),
        )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How one quantized model did.

    Attributes:
        texts: By name.
        routing_shift: By container of a layer's experts: share of the choices of the original's
            router that the quantized model's router does not make for the same token. Empty if the
            backend does not tell.
    """

    texts: Mapping[str, Scores]
    routing_shift: Mapping[str, float]

    @property
    def total(self) -> Scores:
        """Over all texts."""
        return Scores.mean(self.texts.values())


class Scorer:
    """Collects the scores of one quantized model, sequence by sequence."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Scores]] = {}
        self._shifts: dict[str, list[float]] = {}

    def add(
        self, text: str, tokens: torch.Tensor, original: Output, quantized: Output | TopOutput
    ) -> None:
        """Take what both models say to a sequence.

        Args:
            text: Where it comes from.
            tokens: int64 [L].
            original: Of the original model.
            quantized: Of the quantized one.

        Raises:
            MoeqError: A model gives values that are not finite.
        """
        following = tokens[1:, None].to(original.log_probabilities.device)
        expected = original.log_probabilities[:-1]
        if isinstance(quantized, Output):
            got = quantized.log_probabilities[:-1]
            chosen = got.gather(1, following)
            divergence = (expected.exp() * (expected - got)).sum(-1)
            agreement = expected.argmax(-1) == got.argmax(-1)
            self._add_shifts(original.experts, quantized.experts)
        else:
            chosen = quantized.next_token
            divergence = _coarse_divergence(expected, quantized)
            agreement = expected.argmax(-1) == quantized.tokens[:, 0].to(expected.device)
        scores = Scores(
            tokens=len(tokens) - 1,
            loss=-chosen.mean().item(),
            original_loss=-expected.gather(1, following).mean().item(),
            divergence=divergence.mean().item(),
            agreement=agreement.float().mean().item(),
        )
        if not all(map(math.isfinite, (scores.loss, scores.original_loss, scores.divergence))):
            raise MoeqError(f"a model gives NaN or infinity on the text {text}")
        self._parts.setdefault(text, []).append(scores)

    def _add_shifts(self, original: Experts, quantized: Experts) -> None:
        for container, experts in original.items():
            same = (experts[:, :, None] == quantized[container][:, None, :]).any(-1)
            chosen = same[experts >= 0]  # an encoder's layers choose none for targets
            if len(chosen):
                self._shifts.setdefault(container, []).append(1 - chosen.float().mean().item())

    def result(self) -> Evaluation:
        """Return all there is."""
        return Evaluation(
            {text: Scores.mean(parts) for text, parts in self._parts.items()},
            {layer: sum(shifts) / len(shifts) for layer, shifts in self._shifts.items()},
        )


def _coarse_divergence(expected: torch.Tensor, quantized: TopOutput) -> torch.Tensor:
    """Return the divergence between the likeliest tokens and all others taken as one.

    At most the full divergence (data processing inequality), and close to it.
    """
    q = quantized.log_probabilities.to(expected.device).exp()
    p = expected.gather(1, quantized.tokens.to(expected.device)).exp()
    rest = torch.finfo(torch.float32).eps
    q = torch.cat((q, (1 - q.sum(-1, keepdim=True)).clamp(min=rest)), -1)
    p = torch.cat((p, (1 - p.sum(-1, keepdim=True)).clamp(min=rest)), -1)
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
