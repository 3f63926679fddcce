"""Runs a whole model that fits into memory, with transformers."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moeq.checkpoint import SourceModel
from moeq.errors import MoeqError
from moeq.evaluation.scores import Output
from moeq.model import ExpertSource
from moeq.model.architecture import auto_class

_EXPERTS = re.compile(r"layers\.(\d+)\.[^.]+\.experts(?:\.(gate_up_proj|down_proj))?$")
"""Matches the module of a layer's routed experts, and its parameters."""


class WholeModel:
    """A model of transformers, in float32, whose experts can be exchanged.

    Args:
        source: The original checkpoint.
        device: Where it runs.

    Raises:
        MoeqError: transformers arranges the experts of this model in another way than this class
            knows.
    """

    def __init__(self, source: SourceModel, device: torch.device) -> None:
        from transformers import AutoConfig  # takes seconds to import

        auto = auto_class(AutoConfig.from_pretrained(source.folder))
        model = auto.from_pretrained(source.folder, dtype=torch.float32)
        self._model = model.to(device).eval()
        self._layers = {layer.index: layer for layer in source.layers}
        self._fused = {
            (int(match[1]), match[2]): parameter
            for name, parameter in self._model.named_parameters()
            if (match := _EXPERTS.search(name))
        }
        expected = {
            (layer, name) for layer in self._layers for name in ("gate_up_proj", "down_proj")
        }
        if set(self._fused) != expected:
            raise MoeqError(
                f"{source.folder}: transformers arranges the experts of this model in a way that "
                "moeq does not know; use `backend` reference"
            )
        self._chosen: dict[str, torch.Tensor] = {}
        for name, module in self._model.named_modules():
            match = _EXPERTS.search(name)
            if match and int(match[1]) in self._layers:
                module.register_forward_pre_hook(self._recorder(int(match[1])), with_kwargs=True)

    def _recorder(self, index: int) -> Callable[..., None]:
        container = self._layers[index].container

        def record(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            ids = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
            self._chosen[container] = ids.cpu()

        return record

    @torch.inference_mode()
    def fill(self, source: ExpertSource) -> None:
        """Give every expert the weights of a source."""
        for index, layer in self._layers.items():
            gate_up, down = self._fused[index, "gate_up_proj"], self._fused[index, "down_proj"]
            for expert in range(layer.num_experts):
                matrices = source.matrices(layer, expert)
                gate_up[expert].copy_(matrices.w13)
                down[expert].copy_(matrices.w2)

    @torch.inference_mode()
    def outputs(self, tokens: torch.Tensor) -> Iterator[Output]:
        """Yield for each sequence of tokens int64 [n, L] what the model says."""
        for sequence in tokens:
            result = self._model(sequence[None].to(self._model.device), use_cache=False)
            yield Output.of(result.logits[0], dict(self._chosen))
