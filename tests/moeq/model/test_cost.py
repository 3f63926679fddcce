"""What the estimates read off a configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moeq.checkpoint import SourceModel
from moeq.model.cost import experts_of_a_token
from support.models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_of_a_token_are_known(family: str, tiny_model: Callable[[str], Path]) -> None:
    source = SourceModel.open(tiny_model(family))
    top_k = 1 if family.startswith("llama4") else 2
    assert experts_of_a_token(source, source.layers[0]) == top_k
