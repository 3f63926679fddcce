"""ROUGE against the paper that defines it, and the pairs that the example learns from."""

from pathlib import Path

import pytest
from switch_summarization import Pair, Rouge, mean_rouge, pairs_of

# Of the paper (Lin, 2004, section 3.1): what a machine says, and police killed the gunman.
GUNMAN = "police killed the gunman"


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("police kill the gunman", Rouge(3 / 4, 1 / 3, 3 / 4)),
        ("the gunman kill police", Rouge(3 / 4, 1 / 3, 2 / 4)),
        ("Police, killed: THE gunman!", Rouge(1, 1, 1)),
        ("", Rouge(0, 0, 0)),
        ("police police police", Rouge(2 / 7, 0, 2 / 7)),
    ],
)
def test_scores_are_those_of_the_paper(summary: str, expected: Rouge) -> None:
    assert mean_rouge([summary], [GUNMAN]) == pytest.approx(expected)


def test_means_are_over_pairs() -> None:
    assert mean_rouge(["a b", "c"], ["a b", "d"]) == pytest.approx(Rouge(0.5, 0.5, 0.5))


def test_pairs_are_code_without_its_docstring(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        'def f(x):\n    """Return the double of x.\n\n    More."""\n    return 2 * x\n\n\n'
        'def g():\n    """Short."""\n\n\ndef h():\n    """Say nothing at all here."""\n'
    )
    assert list(pairs_of(path)) == [
        Pair("def f(x):\n    return 2 * x", "Return the double of x."),
        Pair("def h():\n    pass", "Say nothing at all here."),
    ]
