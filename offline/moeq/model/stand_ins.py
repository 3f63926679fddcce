"""What stands for parts of a model of transformers while its other parts run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from moeq.checkpoint.families import MoELayer


class Routed(NamedTuple):
    """What the experts of one layer get, for all tokens.

    Attributes:
        x: float32 [T, hidden_size]; times the router weight where that scales inputs.
        ids: int64 [T, top_k].
        weights: float32 [T, top_k], as the experts' outputs are multiplied with.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def of_expert(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens that an expert gets: their places [n] and router weights [n, 1]."""
        places, columns = (self.ids == expert).nonzero(as_tuple=True)
        return places, self.weights[places, columns].unsqueeze(1)


class Recorder:
    """Collects what the experts of a layer get, of some sequences after others.

    Args:
        x: float32 memory [n, L, hidden_size] for it.
        count: Sequences that run at once.
    """

    def __init__(self, x: torch.Tensor, count: int) -> None:
        self._x, self._targets = x, iter(torch.split(x, count))
        self._ids: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def add(self, routed: Routed) -> None:
        """Copy what they get of the next sequences."""
        target = next(self._targets)
        target.copy_(routed.x.detach().view(target.shape))
        self._ids.append(routed.ids.cpu())
        self._weights.append(routed.weights.detach().float().cpu())

    def all(self, multiplier: float) -> Routed:
        """Return what they got of all sequences; router weights times a number."""
        weights = torch.cat(self._weights) * multiplier
        return Routed(self._x.view(-1, self._x.shape[-1]), torch.cat(self._ids), weights)


class Experts(nn.Module):
    """Stands for the experts of a layer.

    Args:
        layer: Where they are.
        give: Takes what they get; returns what they give together, [T, hidden_size].
    """

    def __init__(self, layer: MoELayer, give: Callable[[Routed], torch.Tensor]) -> None:
        super().__init__()
        self._layer, self._give = layer, give

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Give for tokens [T, hidden_size] and their routing [T, top_k]; or for Llama-4's."""
        if top_k_index is not None and top_k_weights is not None:
            return self._give(Routed(hidden_states, top_k_index, top_k_weights))
        # All tokens for each expert: times the router weight, or zeros where it is not chosen.
        every = hidden_states.view(self._layer.num_experts, -1, hidden_states.shape[-1])
        x, ids = every.sum(0), every.any(-1).int().argmax(0)
        given = self._give(Routed(x, ids[:, None], torch.ones_like(x[:, :1])))
        # The layer adds up what all experts give for a token.
        return torch.cat([given, given.new_zeros(len(hidden_states) - len(given), given.shape[1])])


class AllTokens(nn.Module):
    """Stands for what chooses the tokens of sparse attention: chooses all."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the places of tokens for each token, int32 [n, L, L]."""
        count, length = hidden_states.shape[:2]
        places = torch.arange(length, dtype=torch.int32, device=hidden_states.device)
        return places.expand(count, length, length)


class Entrance(nn.Module):
    """Stands for a layer and remembers what it would have got.

    Args:
        layer: The layer.
        in_tuple: Whether it returns hidden states with something else.
    """

    def __init__(self, layer: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        self._layer, self._in_tuple = (layer,), in_tuple  # not a submodule
        self.hidden = torch.empty(0)
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __getattr__(self, name: str) -> Any:
        """Return what the model asks a layer about itself, such as its kind of attention."""
        return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return hidden states as they are."""
        self.hidden, self.arguments = hidden_states, (args, kwargs)
        return (hidden_states, None) if self._in_tuple else hidden_states


class Exit(Entrance):
    """Stands for all layers, once they have run: gives ``hidden``, what the last one gave."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the last layer's output, whatever comes in."""
        return super().forward(self.hidden)


class SwitchExperts(nn.Module):
    """Stands for the experts of a Switch Transformer's layer, of which a token gets one or none.

    Args:
        give: As of :class:`Experts`.
    """

    def __init__(self, give: Callable[[Routed], torch.Tensor]) -> None:
        super().__init__()
        self._give = give

    def forward(
        self, hidden_states: torch.Tensor, selected: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """Give for tokens [T, hidden_size], one-hot choices [T, 1, E], router weights [T, 1]."""
        # Beyond the capacity of an expert a token gets none.
        ids = torch.where(selected.any(-1), selected.argmax(-1), -1)
        return self._give(Routed(hidden_states, ids, routing_weights))


class BlockEntrance(Entrance):
    """Stands for a block of T5's kind.

    Attributes:
        position_bias: What the first block computes and each hands on to the next [1, heads, L, L].
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, in_tuple=False)
        self.position_bias: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return hidden states as they are, and what attention of other blocks needs."""
        return super().forward(hidden_states, *args, **kwargs), self.position_bias, None


class BlockExit(BlockEntrance):
    """Stands for all blocks, as :class:`Exit` does."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the last block's output, whatever comes in."""
        return super().forward(self.hidden)
