"""What an expert computes, against float64."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from moeq.checkpoint import SourceModel
from moeq.model.layerwise import LayerwiseModel

CPU = torch.device("cpu")


def test_an_expert_gives_many_tokens_what_it_gives_few(tiny_model: Callable[[str], Path]) -> None:
    """Also on the way back: some of them run at a time."""
    model = LayerwiseModel(SourceModel.open(tiny_model("mixtral")), CPU)
    matrices = model.matrices(model.moe_layers[0], 0)
    x = torch.randn(5000, model.hidden_size, generator=torch.Generator().manual_seed(0))
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    gate, up = (theirs @ matrices.w13.double().T).chunk(2, -1)
    hidden = torch.nn.functional.silu(gate) * up
    expected = hidden @ matrices.w2.double().T
    output = model.expert_output(matrices, ours)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-3)  # of values up to 400
    close(output, expected.float())
    close(model.expert_hidden(matrices, x), hidden.float())
    (gradient,) = torch.autograd.grad(output.square().sum(), ours)
    (wanted,) = torch.autograd.grad(expected.square().sum(), theirs)
    close(gradient / gradient.abs().max(), (wanted / wanted.abs().max()).float())
