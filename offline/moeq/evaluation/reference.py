"""Runs models layer by layer from disk: several sets of experts cost little more than one."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from moeq.checkpoint.linear import INPUT
from moeq.evaluation.scores import Output
from moeq.model import ExpertSource, LayerwiseModel, Weights, run_layer
from moeq.model.sequences import answered
from moeq.progress import Progress, silent, stage


@torch.no_grad()
def outputs(
    model: LayerwiseModel,
    sources: Sequence[ExpertSource],
    tokens: torch.Tensor,
    progress: Progress = silent,
) -> Iterator[list[Output]]:
    """Yield for each sequence what the model says with each of several sets of experts.

    Args:
        model: All but the experts.
        sources: Sets of experts.
        tokens: int64 [n, L].
        progress: Called after every layer.
    """
    hidden = torch.empty(len(sources), *tokens.shape, model.hidden_size)
    heads: list[Weights] = []
    for _, alike in groupby(sources, key=lambda source: source.linear):
        first, (source, *others) = len(heads), alike
        model.embed(tokens, hidden[first], source.linear_weights(INPUT))
        hidden[first + 1 : first + 1 + len(others)] = hidden[first]
        heads += [source.linear_weights(len(model))] * (1 + len(others))
    flat, x = hidden.flatten(0, 1), torch.empty_like(hidden).flatten(0, 1)
    chosen: dict[str, torch.Tensor] = {}
    with stage(progress, "evaluate", len(model), "layer") as advance:
        for index in range(len(model)):
            routed = run_layer(model, index, flat, x, sources)
            if routed is not None:
                container = model.moe_layers[index].container
                chosen[container] = routed.ids.view(len(sources), *tokens.shape, -1)
            advance(1)
    for i in range(len(tokens)):
        yield [
            Output.of(
                model.logits(stream[i, answered(model.source.reader.config, tokens[i])], head),
                {container: ids[number, i] for container, ids in chosen.items()},
            )
            for number, (stream, head) in enumerate(zip(hidden, heads, strict=True))
        ]
