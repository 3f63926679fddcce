"""What sequences of tokens are to a model with an encoder: a source and a target in one.

Of L tokens the first three quarters are the source. The others are what the decoder gets: the token
that it starts with, and the target, each token of which it is to predict from those before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moeq.checkpoint.families import family_of
from moeq.errors import MoeqError

_TARGET_SHARE = 4
_SHORTEST = 2 * _TARGET_SHARE
"""Tokens of which one is in the target."""


@dataclass(frozen=True, slots=True)
class SourceAndTarget:
    """How sequences of a model with an encoder are put together.

    Attributes:
        start: The token that a decoder starts with.
        pad: The token that fills sources and targets; nothing is asked there.
    """

    start: int
    pad: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "SourceAndTarget | None":
        """Read ``config.json``; None if the model has no encoder.

        Raises:
            MoeqError: A token is missing there.
        """
        if not family_of(config).encodes:
            return None
        pad = config.get("pad_token_id")
        start = config.get("decoder_start_token_id")
        if not isinstance(pad, int) or not isinstance(start, int):
            raise MoeqError(
                "config.json needs pad_token_id and decoder_start_token_id, which text needs; they "
                f"are {pad!r} and {start!r} (both are 0 in google/switch-base-8)"
            )
        return cls(start, pad)

    @staticmethod
    def source_length(length: int) -> int:
        """Return how many tokens of a sequence are the source.

        Raises:
            MoeqError: The sequence is too short for a target.
        """
        if length < _SHORTEST:
            raise MoeqError(
                f"`seqlen` {length} leaves no target for the decoder; give at least {_SHORTEST}"
            )
        return length - length // _TARGET_SHARE

    def joined(self, source: list[int], target: list[int], length: int) -> list[int]:
        """Return a sequence: source and target, cut or filled."""
        places = self.source_length(length)
        source = source[:places] + [self.pad] * (places - len(source))
        target = [self.start, *target][: length - places]
        return source + target + [self.pad] * (length - places - len(target))

    def split(self, text: torch.Tensor) -> torch.Tensor:
        """Return sequences int64 [n, L] of running text [n, L - 1]: the target goes on with it."""
        places = self.source_length(text.shape[1] + 1)
        start = text.new_full((len(text), 1), self.start)
        return torch.cat([text[:, :places], start, text[:, places:]], 1)

    def kept(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return bool [n, L]: which of these tokens are no padding."""
        kept = tokens != self.pad
        kept[:, self.source_length(tokens.shape[1])] = True  # many models start with it
        return kept


def answered(config: Mapping[str, Any], tokens: torch.Tensor) -> slice:
    """Return the places of a sequence [L] at which a model says what comes next, and is judged.

    Args:
        config: ``config.json`` of the model.
        tokens: int64 [L]: all of them, or the decoder's without padding.
    """
    parts = SourceAndTarget.of(config)
    if parts is None:
        return slice(0, len(tokens))
    first = parts.source_length(len(tokens))
    return slice(first, first + int(parts.kept(tokens[None])[0, first:].sum()))
