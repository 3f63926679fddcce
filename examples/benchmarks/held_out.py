"""Judges a quantized model on text that nothing was fitted to."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from plan_quality import PlannedModel, Text


class Judgement(NamedTuple):
    """Means over all tokens, in nats.

    Attributes:
        increase: Of the negative log-likelihood, over the original model's.
        divergence: Kullback-Leibler divergence from the original's next-token distribution. It
            counts every change of the distribution and not only what it does to the one token
            that came, so chance matters less.
    """

    increase: float
    divergence: float


class HeldOut:
    """Held-out text, with what the original model says to it.

    Args:
        original: The model as it was loaded.
        texts: Windows of tokens.
    """

    @torch.inference_mode()
    def __init__(self, original: PlannedModel, texts: list[Text]) -> None:
        self._batches = [batch for text in texts for batch in text.batches]
        self._head = original.model.lm_head.weight.clone()
        self._hidden = [_last_hidden(original, batch) for batch in self._batches]
        self.tokens = sum(text.tokens for text in texts)
        self.loss = 0.0
        self.loss = self.judge(original).increase

    @torch.inference_mode()
    def judge(self, model: PlannedModel) -> Judgement:
        """Return what a model gives now."""
        head, loss, divergence = model.model.lm_head.weight, 0.0, 0.0
        for batch, hidden in zip(self._batches, self._hidden, strict=True):
            wanted = (hidden[:, :-1] @ self._head.T).log_softmax(-1)
            given = (_last_hidden(model, batch)[:, :-1] @ head.T).log_softmax(-1)
            loss += F.nll_loss(given.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
            divergence += F.kl_div(given, wanted, log_target=True, reduction="sum").item()
        return Judgement(loss / self.tokens - self.loss, divergence / self.tokens)


def _last_hidden(model: PlannedModel, batch: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model.model.model(batch, use_cache=False).last_hidden_state
    return hidden
