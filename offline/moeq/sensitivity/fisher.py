"""How much the loss grows by an error in what a layer's experts give together, token by token.

The loss of a model whose experts' sums are off by d grows by about half of sum_t (g_t . d_t)^2,
where g_t is the gradient, with respect to the sum at token t, of the log-probability of tokens
drawn from the model's own distribution: the Fisher information, which is the Hessian of the
Kullback-Leibler divergence from the model itself (Amari, "Natural gradient works efficiently in
learning", 1998). Terms between different tokens are left out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from moeq.checkpoint.linear import INPUT
from moeq.errors import MoeqError
from moeq.model import ExpertSource, LayerwiseModel, Routed, Watch, run_layer
from moeq.model.activations import mapped
from moeq.model.sequences import answered
from moeq.progress import Progress, silent, stage
from moeq.sensitivity.linear import LinearBank

_DRAWN_AT_ONCE = 64
"""Distributions [V] that are in memory in float64."""
_EXPERTS, _GRADIENT = "experts.bin", "gradient.bin"
"""What the experts of a layer get, and the gradient of what they give."""


class Traffic(NamedTuple):
    """What goes in and out of the experts of a layer.

    Attributes:
        layer: Which.
        routed: What they get.
        gradient: Of the loss, with respect to the sum of their shares: float32 [n, L, hidden_size].
    """

    layer: int
    routed: Routed
    gradient: torch.Tensor


def gradients(
    model: LayerwiseModel,
    tokens: torch.Tensor,
    folder: Path,
    seed: int,
    progress: Progress = silent,
    linear: LinearBank | None = None,
) -> Iterator[Traffic]:
    """Run forward, and return what runs back, a layer whenever it is asked for the next.

    Args:
        model: The model, with its own experts.
        tokens: int64 [n, L].
        folder: Gets activations, which the system keeps in memory where it can: what each layer
            gets, until it has run back, and what goes in and out of the experts of one.
        seed: Of the drawn tokens.
        progress: Hears of every layer on the way forward.
        linear: Rounds dense layers on the way, and measures them on the way back.

    Returns:
        Traffic of each layer with experts, the last one first; in memory that the next one takes.

    Raises:
        MoeqError: Activations or weights that are not finite.
    """
    shape = (*tokens.shape, model.hidden_size)
    states = [mapped(_input(folder, index), shape) for index in range(len(model))]
    x, of_sums = (mapped(folder / name, shape) for name in (_EXPERTS, _GRADIENT))
    hidden = torch.empty(shape)
    sources = [ExpertSource.original(model)]
    with stage(progress, "gradients", len(model), "layer") as advance, torch.no_grad():
        model.embed(tokens, hidden)
        if linear is not None:
            linear.round(INPUT, hidden)
        for index in range(len(model)):
            states[index].copy_(hidden)
            if linear is not None:
                linear.round(index, hidden)
            run_layer(model, index, hidden, x, sources)
            model.check_finite(index, hidden)
            advance(1)
        if linear is not None:
            linear.round(len(model), hidden)
    watch = {} if linear is None else linear.watch(len(model))
    gradient = _of_head(model, tokens, hidden, seed, watch)
    return _back(model, tokens, folder, states, gradient, x, of_sums, linear)


def _back(
    model: LayerwiseModel,
    tokens: torch.Tensor,
    folder: Path,
    states: list[torch.Tensor],
    gradient: torch.Tensor,
    x: torch.Tensor,
    of_sums: torch.Tensor,
    linear: LinearBank | None,
) -> Iterator[Traffic]:
    """Yield the traffic of each layer with experts; ``states`` and ``gradient`` are used up."""
    for index in reversed(range(len(model))):
        watch = {} if linear is None else linear.watch(index)
        routed = model.backward(index, states.pop(), gradient, x, of_sums, watch)
        del watch  # it holds the errors of dense layers
        _input(folder, index).unlink()
        if routed is not None:
            yield Traffic(index, routed, of_sums)
    for name in (_EXPERTS, _GRADIENT):
        (folder / name).unlink()
    if linear is not None:
        linear.measure_embeddings(tokens, gradient)


def _input(folder: Path, index: int) -> Path:
    return folder / f"input-{index}.bin"


def _of_head(
    model: LayerwiseModel, tokens: torch.Tensor, hidden: torch.Tensor, seed: int, watch: Watch
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.zeros_like(hidden)
    for sequence, state, target in zip(tokens, hidden, gradient, strict=True):
        places = answered(model.source.reader.config, sequence)
        with torch.enable_grad():
            inputs = state[places].clone().requires_grad_()
            log_probabilities = model.logits(inputs, watch=watch).log_softmax(-1)
            if not torch.isfinite(log_probabilities).all():
                raise MoeqError(
                    f"{model.source.folder}: the output head gives NaN or infinity on the "
                    "calibration text; are its weights finite?"
                )
            drawn = _drawn(log_probabilities.detach(), generator)
            chosen = log_probabilities.gather(1, drawn.to(log_probabilities.device))
            (of_inputs,) = torch.autograd.grad(chosen.sum(), inputs)
        target[places] = of_inputs
    return gradient


def _drawn(log_probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a token from each of the distributions [L, V], on the CPU: [L, 1].

    One random number each, where ``torch.multinomial`` takes V.
    """
    drawn = []
    for some in torch.split(log_probabilities, _DRAWN_AT_ONCE):
        cumulative = some.cpu().exp().cumsum(-1, dtype=torch.float64)
        at = torch.rand(len(some), 1, generator=generator, dtype=torch.float64)
        places = torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True)
        drawn.append(places.clamp_(max=some.shape[1] - 1))
    return torch.cat(drawn)
