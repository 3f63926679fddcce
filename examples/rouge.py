"""ROUGE: how much of a reference summary another one has (Lin, 2004), in words of lower case."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Rouge(NamedTuple):
    """F1 scores from 0 to 1: of words, of pairs of words, of the longest common subsequence."""

    rouge_1: float
    rouge_2: float
    rouge_l: float


def rouge(summary: str, reference: str) -> Rouge:
    """Return the scores of one summary; words are runs of letters and digits, not stemmed."""
    found, wanted = (re.findall("[a-z0-9]+", text.lower()) for text in (summary, reference))
    pairs = [list(zip(words, words[1:], strict=False)) for words in (found, wanted)]
    return Rouge(
        _f1((Counter(found) & Counter(wanted)).total(), len(found), len(wanted)),
        _f1((Counter(pairs[0]) & Counter(pairs[1])).total(), *map(len, pairs)),
        _f1(_common_subsequence(found, wanted), len(found), len(wanted)),
    )


def mean_rouge(summaries: Iterable[str], references: Iterable[str]) -> Rouge:
    """Return the means over pairs of a summary and its reference."""
    scores = [rouge(*pair) for pair in zip(summaries, references, strict=True)]
    return Rouge(*(sum(score) / len(scores) for score in zip(*scores, strict=True)))


def _f1(common: int, found: int, wanted: int) -> float:
    return 2 * common / (found + wanted) if common else 0.0


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest sequence of words that both have in this order."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        before = 0  # of the words before, in both
        for place, other in enumerate(second):
            here = lengths[place + 1]
            lengths[place + 1] = before + 1 if word == other else max(here, lengths[place])
            before = here
    return lengths[-1]
