"""How much text a calibration takes if nobody says."""

from pathlib import Path

import pytest

from moeq.calibration import default_sequences
from moeq.checkpoint import SourceModel
from support.checkpoints import NUM_EXPERTS, write_checkpoint


@pytest.mark.parametrize("length", [1, 16, 512])
@pytest.mark.parametrize("top_k", [1, 3])
def test_small_experts_get_enough_with_fewer_sequences(
    tmp_path: Path, length: int, top_k: int
) -> None:
    source = SourceModel.open(write_checkpoint(tmp_path, num_experts_per_tok=top_k))
    columns = max(source.layers[0].hidden_size, source.layers[0].intermediate_size)

    count = default_sequences(source, length)

    def tokens_of_an_expert(sequences: int) -> float:
        return sequences * length * top_k / NUM_EXPERTS

    assert count == 128 or tokens_of_an_expert(count) >= 16 * columns
    assert count == 1 or tokens_of_an_expert(count - 1) < 16 * columns
