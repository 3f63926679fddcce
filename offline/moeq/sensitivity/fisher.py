"""How much the loss minds an error in the output of a layer, token by token.

The loss of a model whose layer outputs are off by d grows by about half of sum_t (g_t . d_t)^2,
where g_t is the gradient, with respect to the output at token t, of the log-probability of tokens
drawn from the model's own distribution: the Fisher information, which is the Hessian of the
Kullback-Leibler divergence from the model itself (Amari, "Natural gradient works efficiently in
learning", 1998). Terms between different tokens are left out.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from moeq.errors import MoeqError
from moeq.evaluation.reference import ExpertSource, run_layer
from moeq.model.layerwise import LayerwiseModel


def gradients(
    model: LayerwiseModel, tokens: torch.Tensor, folder: Path, seed: int, progress: bool = True
) -> list[torch.Tensor]:
    """Return the gradient of the outputs of every layer: float32 [n, L, hidden_size] each.

    Args:
        model: The model, with its own experts.
        tokens: int64 [n, L].
        folder: Gets activations and gradients, which the system keeps in memory where it can.
        seed: Of the drawn tokens.
        progress: Show a progress bar.

    Raises:
        MoeqError: Activations or weights that are not finite.
    """
    shape = (*tokens.shape, model.hidden_size)
    paths = [folder / f"input-{index}.bin" for index in range(len(model))]
    states = [mapped(path, shape) for path in paths]
    hidden, x = torch.empty(2, *shape)
    sources = [ExpertSource.original(model)]
    with tqdm(total=2 * len(model), desc="fisher", disable=not progress) as bar:
        with torch.no_grad():
            model.embed(tokens, hidden)
            for index in range(len(model)):
                states[index].copy_(hidden)
                run_layer(model, index, hidden, x, sources)
                check_finite(model, index, hidden)
                bar.update()
        gradient = _of_head(model, hidden, seed)
        found = []
        for index in reversed(range(len(model))):
            found.append(mapped(folder / f"gradient-{index}.bin", shape))
            found[-1].copy_(gradient)
            model.backward(index, states.pop(), gradient)
            paths[index].unlink()
            bar.update()
    return found[::-1]


def _of_head(model: LayerwiseModel, hidden: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.empty_like(hidden)
    for state, target in zip(hidden, gradient, strict=True):
        with torch.enable_grad():
            inputs = state.clone().requires_grad_()
            log_probabilities = model.logits(inputs).log_softmax(-1)
            drawn = torch.multinomial(
                log_probabilities.detach().exp().cpu(), 1, generator=generator
            )
            chosen = log_probabilities.gather(1, drawn.to(log_probabilities.device))
            (found,) = torch.autograd.grad(chosen.sum(), inputs)
        target.copy_(found)
    return gradient


def check_finite(model: LayerwiseModel, index: int, hidden: torch.Tensor) -> None:
    """Check what a layer gives.

    Raises:
        MoeqError: It is not finite.
    """
    if not torch.isfinite(hidden).all():
        raise MoeqError(
            f"{model.reader.folder}: layer {index} gives NaN or infinity on the calibration text; "
            "are its weights finite?"
        )


def mapped(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Return float32 memory that the system may write to a file when it needs the space."""
    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)
