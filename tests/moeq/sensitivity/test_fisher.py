"""The Fisher information against divergences that transformers computes in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeq.checkpoint import SourceModel
from moeq.model.layerwise import LayerwiseModel
from moeq.sensitivity.fisher import gradients
from support.models import VOCABULARY

DRAWS, LENGTH, STEP = 400, 10, 1e-2


@pytest.mark.parametrize(("family", "layer", "place"), [("mixtral", 1, 5), ("flex_olmo", 0, 2)])
def test_gradients_foretell_the_divergence(
    family: str, layer: int, place: int, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    sequence = torch.randint(VOCABULARY, (1, LENGTH), generator=generator)
    source = SourceModel.open(folder)
    model = LayerwiseModel(source, torch.device("cpu"))
    # The same sequence over and over: as many draws of the tokens that follow.
    found = gradients(model, sequence.expand(DRAWS, -1), tmp_path, seed=0)
    direction = torch.randn(model.hidden_size, generator=generator)
    foretold = (found[layer][:, place] @ direction).square().mean().item() / 2 * STEP**2

    whole = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        before = whole(sequence).logits.log_softmax(-1)

        def push(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            output[place] += STEP * direction
            return output

        whole.model.layers[layer].mlp.experts.register_forward_hook(push)
        after = whole(sequence).logits.log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum().item()
    # The mean of 400 squares of normal numbers is off by 7 % (standard deviation).
    assert foretold == pytest.approx(divergence, rel=0.25)
