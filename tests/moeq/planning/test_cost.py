"""What measuring takes, of a model whose ``config.json`` may say nothing of its depth, or lie."""

from pathlib import Path

import pytest

from moeq.checkpoint import SourceModel
from moeq.errors import MoeqError
from moeq.planning.cost import measuring_bytes
from support.checkpoints import HIDDEN, NUM_LAYERS, write_checkpoint

TOKENS = 16


def test_every_layer_keeps_what_it_gets(tmp_path: Path) -> None:
    """Also those without experts, of which only the depth tells."""
    plain = SourceModel.open(write_checkpoint(tmp_path / "plain"))
    deeper = SourceModel.open(write_checkpoint(tmp_path / "deeper", num_hidden_layers=5))
    more = measuring_bytes(deeper, (2,), (32,), TOKENS) - measuring_bytes(
        plain, (2,), (32,), TOKENS
    )
    assert more == (5 - NUM_LAYERS) * 4 * TOKENS * HIDDEN


@pytest.mark.parametrize("depth", [None, "two", 2.5])
def test_a_depth_that_is_no_number_is_named(depth: object, tmp_path: Path) -> None:
    source = SourceModel.open(write_checkpoint(tmp_path / "model", num_hidden_layers=depth))
    message = rf"{source.folder}: config\.json has num_hidden_layers {depth!r}, no number of layers"
    with pytest.raises(MoeqError, match=message):
        measuring_bytes(source, (2,), (32,), TOKENS)
