"""What the estimates read off a configuration."""

from pathlib import Path
from typing import Any

import pytest

from moeq.checkpoint import SourceModel
from moeq.model.cost import experts_of_a_token
from support.checkpoints import NUM_EXPERTS, write_checkpoint


@pytest.mark.parametrize(
    ("config", "top_k"),
    [
        ({"num_experts_per_tok": 3}, 3),
        ({"moe_k": 3}, 3),  # ERNIE-4.5
        ({"moe_topk": 3}, 3),  # Hunyuan
        ({"moe_topk": [1, 2]}, 2),  # Hunyuan, for each layer
        ({"top_k_experts": 3}, 3),  # Gemma-4
        ({"text_config": {"num_experts_per_tok": 3}}, 3),  # inside a vision model
        ({}, NUM_EXPERTS),
    ],
)
def test_the_experts_of_a_token_are_known_by_all_their_names(
    config: dict[str, Any], top_k: int, tmp_path: Path
) -> None:
    source = SourceModel.open(write_checkpoint(tmp_path, **config))
    assert experts_of_a_token(source, source.layers[0]) == top_k
