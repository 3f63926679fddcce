"""Which part of the calibration text judges plans, and which they are made from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeq.allocation import PlanOptions
from moeq.checkpoint import SourceModel
from moeq.planning.measurement import Measurement


@pytest.mark.parametrize(
    ("count", "length", "judge", "make"),
    [
        (3, 64, 0, 3),
        (8, 64, 2, 6),
        (64, 512, 8, 16),  # 4096 tokens judge; 8192 give an expert 2048, being 2 of 8
        (128, 512, 8, 16),
        (8, 20000, 1, 1),
    ],
)
def test_a_quarter_judges_plans_but_no_more_than_it_takes(
    tiny_model: Callable[[str], Path], count: int, length: int, judge: int, make: int
) -> None:
    source = SourceModel.open(str(tiny_model("mixtral")))
    assert (source.layers[0].num_experts, source.reader.config["num_experts_per_tok"]) == (8, 2)
    tokens = torch.arange(count * length).view(count, length)

    def measurement(strategy: str) -> Measurement:
        options = PlanOptions(2.5, strategy=strategy)
        return Measurement(source, options, tokens, "gptq", torch.device("cpu"))

    auto, alone = measurement("auto"), measurement("sensitivity")
    assert torch.equal(auto.held_back, tokens[:judge])
    assert torch.equal(auto.measured, tokens[judge : judge + make])
    assert len(alone.held_back) == 0
    assert torch.equal(alone.measured, tokens[: len(alone.measured)])
