"""Layers one at a time against the whole model of transformers, for every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeq.checkpoint import SourceModel
from moeq.checkpoint.families import family_of
from moeq.errors import MoeqError
from moeq.model import ExpertSource, run_layer
from moeq.model.layerwise import LayerwiseModel
from support.models import (
    FAMILIES,
    KNOWN,
    VOCABULARY,
    decoder_layers,
    load_model,
)
from support.sources import load, rewrite

ATOL = {"deepseek_v3": 5e-4, "deepseek_v32": 5e-4, "granitemoeshared": 2e-3}
"""Where gradients reach 900: transformers' own, in float32, are 0.0015 and 0.025 from float64's."""
NOT_LAYERWISE = [f for f in FAMILIES if family_of({"model_type": f}).not_layerwise]
every_family = pytest.mark.parametrize("family", [f for f in KNOWN if f not in NOT_LAYERWISE])


@pytest.mark.parametrize("family", NOT_LAYERWISE)
def test_layers_that_do_more_with_experts_are_refused(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    source = SourceModel.open(tiny_model(family))
    with pytest.raises(MoeqError, match="with `--calib none`, evaluate with `--backend"):
        LayerwiseModel(source, torch.device("cpu"))


@every_family
def test_logits_are_those_of_transformers(family: str, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model(family)
    tokens = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    whole = load_model(folder).eval()
    with torch.inference_mode():
        expected = whole(tokens).logits

    source = SourceModel.open(folder)
    model = LayerwiseModel(source, torch.device("cpu"))
    hidden = torch.empty(*tokens.shape, model.hidden_size)
    x = torch.empty_like(hidden)
    model.embed(tokens, hidden)
    for index in range(len(model)):
        routed = model.run(index, hidden, x)
        if routed is None:
            continue
        layer = model.moe_layers[index]
        flat = hidden.view(-1, hidden.shape[-1])
        for expert in range(layer.num_experts):
            places, weights = routed.of_expert(expert)
            matrices = model.matrices(layer, expert)
            output = model.expert_output(matrices, routed.x[places])
            flat.index_add_(0, places, output * weights)
    with torch.no_grad():
        logits = torch.stack([model.logits(sequence) for sequence in hidden])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_models_that_tell_of_their_routers_have_the_same_logits(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """As configurations do that are left from training."""
    source = tiny_model("mixtral")
    told = rewrite(source, tmp_path / "told", load(source), output_router_logits=True)
    hidden = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    logits = []
    for folder in (source, told):
        model = LayerwiseModel(SourceModel.open(folder), torch.device("cpu"))
        model.embed(torch.zeros(1, 4, dtype=torch.int64), torch.empty(1, 4, 128))
        with torch.no_grad():
            logits.append(model.logits(hidden))
    assert torch.equal(*logits)


@every_family
def test_gradients_are_those_of_transformers(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    folder = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 24), generator=generator)
    whole = load_model(folder).eval()
    outputs: list[torch.Tensor] = []
    decoder_layers(whole)[-1].register_forward_hook(
        lambda module, args, output: outputs.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    inputs_of_layers: list[torch.Tensor] = []
    decoder_layers(whole)[0].register_forward_pre_hook(
        lambda module, args: inputs_of_layers.append(args[0])
    )
    whole(tokens)
    (embedded,) = inputs_of_layers
    gradient = torch.randn(embedded.shape, generator=generator)
    (expected,) = torch.autograd.grad(outputs[0], embedded, gradient)

    source = SourceModel.open(folder)
    model = LayerwiseModel(source, torch.device("cpu"))
    hidden = torch.empty(embedded.shape)
    model.embed(tokens, hidden)
    inputs = []
    for index in range(len(model)):
        inputs.append(hidden.clone())
        run_layer(model, index, hidden, torch.empty_like(hidden), [ExpertSource.original(model)])
    for index in reversed(range(len(model))):
        model.backward(index, inputs[index], gradient)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=ATOL.get(family, 1e-4))
