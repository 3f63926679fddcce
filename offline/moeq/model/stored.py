"""A model of transformers whose parts get their tensors from a checkpoint only while they run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from moeq.checkpoint.families import Matrix, MoELayer
from moeq.checkpoint.meta import auto_class
from moeq.checkpoint.source import SourceModel
from moeq.errors import MoeqError
from moeq.model.architecture import parts_on_disk, stored_names
from moeq.model.watch import Watch, forward_hook

Weights = Mapping[str, torch.Tensor]
"""Name on disk to float32 weights that stand for those of the checkpoint."""
NO_WEIGHTS: Weights = {}
"""All are those of the checkpoint."""


class ExpertMatrices(NamedTuple):
    """What one expert computes with, in float32.

    Attributes:
        w13: Gate above up [2I, H], or up alone [I, H].
        w2: Down [H, I].
        w13_bias: Of the same rows; None if the family has no biases.
        w2_bias: Likewise.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None


class StoredModel:
    """A model without memory, and where its tensors are.

    Args:
        source: The checkpoint.
        device: Where parts run.
        config: Of the model, in transformers.
    """

    def __init__(self, source: SourceModel, device: torch.device, config: Any) -> None:
        self.source, self.device = source, device
        with torch.device("meta"):
            self._model = (
                auto_class(config)
                .from_config(config, dtype=torch.float32, trust_remote_code=False)
                .eval()
            )
        self._names = {module: f"{name}." for name, module in self._model.named_modules()}
        self._stored = stored_names(self._model, source.reader.tensors)
        self._parts = parts_on_disk(self._model)

    def matrices(self, layer: MoELayer, expert: int) -> ExpertMatrices:
        """Read an expert's 16- or 32-bit weights.

        Raises:
            MoeqError: They are not finite; names the tensor.
        """
        w13, w2 = self._joined(layer, lambda matrix: layer.tensor_name(expert, matrix))
        return ExpertMatrices(w13, w2, *self.biases(layer, expert))

    def biases(
        self, layer: MoELayer, expert: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Read an expert's biases of w13 and w2; None if the family has none.

        Raises:
            MoeqError: They are not finite; names the tensor.
        """
        if not layer.family.biased:
            return None, None
        return self._joined(layer, lambda matrix: layer.bias_name(expert, matrix))

    def _joined(
        self, layer: MoELayer, name: Callable[[Matrix], str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a tensor of each matrix, joined as w13 and w2."""
        w13, w2 = (
            torch.cat([self._finite(name(matrix)) for matrix in matrices])
            for matrices in layer.projections.values()
        )
        return w13, w2

    def _finite(self, name: str) -> torch.Tensor:
        tensor = self.source.tensor(name).to(self.device).float()
        if not torch.isfinite(tensor).all():
            raise MoeqError(
                f"{self.source.folder}: cannot quantize {name}: weights are NaN or infinite"
            )
        return tensor

    def _fill(self, module: nn.Module, prefix: str, weights: Weights = NO_WEIGHTS) -> None:
        """Give a module of the model its tensors from the checkpoint, but for some weights.

        Raises:
            MoeqError: transformers builds another model than the checkpoint holds.
        """
        module.to("meta")  # so that nothing but what is not on disk is initialized
        for part in module.modules():
            if names := part._non_persistent_buffers_set:
                for name in names:
                    setattr(part, name, torch.empty_like(getattr(part, name), device=self.device))
                self._model._init_weights(part)
        state = {}
        for name in module.state_dict():
            tensors = [
                weights[stored] if stored in weights else self.source.tensor(stored)
                for stored in self._stored_parts(prefix + name)
            ]
            tensor = (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(self.device)
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
        module.load_state_dict(state, assign=True)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_meta:
                raise MoeqError(
                    f"{self.source.folder}: {prefix}{name} is not in the checkpoint, but "
                    "transformers needs it"
                )

    @contextmanager
    def _watched(self, module: nn.Module, watch: Watch) -> Iterator[None]:
        """Let a watch see the inputs and outputs of linear layers in a module."""
        hooks = [
            part.register_forward_hook(forward_hook([watch.get(stored) for stored in names]))
            for name, part in module.named_modules()
            if isinstance(part, nn.Linear)
            and not watch.keys().isdisjoint(
                names := self._stored_parts(f"{self._names[part]}weight")
            )
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _stored_parts(self, name: str) -> list[str]:
        """Return where a parameter is on disk; some are made of several tensors."""
        return [self._stored_name(part) for part in self._parts.get(name, [name])]

    def _stored_name(self, name: str) -> str:
        """Return where a parameter is on disk; one that is missing is named as in memory."""
        return self._stored.get(name, name)
