"""What the check of loaded parameters says of models that no engine on a CPU can run."""

from typing import Any

import pytest
import torch
from torch.nn import Module, Parameter

from vllm_moeq.format import FormatError

pytestmark = pytest.mark.vllm


def _router() -> Any:
    """Return a module with a table of experts, which begins random as in vLLM's DeepSeek-V4."""
    model: Any = Module()
    model.gate = Module()
    table = torch.randint(0, 8, (320, 2), dtype=torch.int32)
    model.gate.tid2eid = Parameter(table, requires_grad=False)
    return model


def test_a_table_of_integers_that_nothing_fills_is_refused() -> None:
    from vllm_moeq.load_check import must_fill

    model, message = _router(), r"lacks weights.*: gate\.tid2eid \(2 of 640\)"
    with pytest.raises(FormatError, match=message), must_fill(model, predicts=False):
        model.gate.tid2eid.data[1:] = 7


def test_a_table_of_integers_that_is_filled_is_served() -> None:
    from vllm_moeq.load_check import must_fill

    model, table = _router(), torch.arange(640, dtype=torch.int32).view(320, 2)
    with must_fill(model, predicts=False):
        model.gate.tid2eid.data.copy_(table)
    assert torch.equal(model.gate.tid2eid, table)


def test_packed_weights_are_left_to_the_check_of_their_names() -> None:
    """Each of their values is a weight."""
    from vllm_moeq.linear import PACKED_COLUMNS
    from vllm_moeq.load_check import must_fill

    layer: Any = Module()
    packed = torch.full((4, 4), torch.iinfo(torch.int32).min, dtype=torch.int32)
    layer.weight_packed = Parameter(packed, requires_grad=False)
    setattr(layer, PACKED_COLUMNS, {"layer.weight_packed": 4})
    with must_fill(layer, predicts=False):
        pass
