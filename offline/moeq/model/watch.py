"""Forward hooks that see the inputs and outputs of dense layers while a model runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Watch = Mapping[str, Callable[[torch.Tensor, torch.Tensor], None]]
"""Name on disk of a weight to what gets the inputs and outputs of its linear layer."""
NO_WATCH: Watch = {}


def forward_hook(
    watch: Sequence[Callable[[torch.Tensor, torch.Tensor], None] | None],
) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor | None]:
    """Return a hook of a linear layer whose outputs have parts of equal size.

    Args:
        watch: Gets inputs and outputs of each part.
    """

    def hook(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        parts = output.chunk(len(watch), -1) if len(watch) > 1 else (output,)
        for see, part in zip(watch, parts, strict=True):
            if see is not None:
                see(args[0], part)
        # Of what is seen, for gradients to come by.
        return torch.cat(parts, -1) if len(parts) > 1 else None

    return hook


class AllSeen(Exception):
    """All that is watched has been seen: the rest of a run is not needed."""


def ending_when_seen(watch: Watch) -> tuple[Watch, Callable[[], None]]:
    """Return the same watch, which ends a run as soon as all layers in it have been seen once.

    No linear layer of a decoder layer runs twice; a second time would not be seen.

    Returns:
        The watch, which raises :class:`AllSeen`; and what has to be called before each run.
    """
    missing: set[str] = set()

    def last(name: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def see(x: torch.Tensor, output: torch.Tensor) -> None:
            watch[name](x, output)
            missing.discard(name)
            if not missing:
                raise AllSeen

        return see

    return {name: last(name) for name in watch}, lambda: missing.update(watch)
