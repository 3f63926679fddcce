"""The Fisher information against divergences that transformers computes in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeq.checkpoint import SourceModel
from moeq.checkpoint.temporary import used_bytes
from moeq.errors import MoeqError
from moeq.model import layerwise_model
from moeq.model.layerwise import LayerwiseModel
from moeq.planning.cost import measuring_bytes
from moeq.sensitivity.fisher import _drawn, gradients
from support.models import VOCABULARY
from support.sources import load, rewrite

DRAWS, LENGTH, STEP = 400, 10, 1e-2


@pytest.mark.parametrize(("family", "layer", "place"), [("mixtral", 1, 5), ("flex_olmo", 0, 2)])
def test_gradients_predict_the_divergence(
    family: str, layer: int, place: int, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    sequence = torch.randint(VOCABULARY, (1, LENGTH), generator=generator)
    source = SourceModel.open(folder)
    model = LayerwiseModel(source, torch.device("cpu"))
    # The same sequence over and over: as many draws of the tokens that follow.
    direction = torch.randn(model.hidden_size, generator=generator)
    (products,) = [
        found.gradient[:, place] @ direction
        for found in gradients(model, sequence.expand(DRAWS, -1), tmp_path, seed=0)
        if found.layer == layer
    ]
    predicted = products.square().mean().item() / 2 * STEP**2

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
    assert predicted == pytest.approx(divergence, rel=0.25)


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_activations_take_the_space_that_is_told(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """What every layer gets, and what goes in and out of the experts of one: also if others are."""
    source = SourceModel.open(tiny_model(family))
    model = layerwise_model(source, torch.device("cpu"))
    tokens = torch.randint(3, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(0))
    used: list[int] = []
    found = []
    way = gradients(model, tokens, tmp_path, 0, lambda *_: used.append(used_bytes(tmp_path)))
    for traffic in way:
        used.append(used_bytes(tmp_path))
        found.append(traffic.layer)
    assert found == sorted(model.moe_layers, reverse=True)
    stream = 4 * tokens.numel() * source.hidden_size
    assert max(used) == measuring_bytes(source, (), (), tokens.numel()) == stream * (len(model) + 2)
    assert used[-1] == stream * (found[-1] + 2)  # what layers get goes on the way
    assert not any(tmp_path.iterdir())


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    draws = 20_000
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    drawn = _drawn(probabilities.log().expand(draws, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (draws, 1)
    counts = torch.bincount(drawn[:, 0], minlength=len(probabilities))
    expected = draws * probabilities
    assert ((counts - expected).abs() <= 4 * (expected * (1 - probabilities)).sqrt()).all()


def test_a_head_that_is_not_finite_is_named(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("mixtral")
    tensors = load(folder)
    tensors["lm_head.weight"][7, 3] = torch.nan
    model = LayerwiseModel(
        SourceModel.open(rewrite(folder, tmp_path / "model", tensors)), torch.device("cpu")
    )
    with pytest.raises(MoeqError, match="output head gives NaN"):
        gradients(model, torch.arange(8)[None], tmp_path, seed=0)
