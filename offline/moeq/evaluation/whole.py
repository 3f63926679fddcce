"""Runs a whole model that fits into memory, with transformers."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moeq.checkpoint import CheckpointReader, SourceModel
from moeq.checkpoint.meta import auto_class
from moeq.checkpoint.precision import QUANTIZATION_KEYS, in_16_bits
from moeq.errors import MoeqError
from moeq.evaluation.scores import Output
from moeq.model import ExpertSource, Weights
from moeq.model.architecture import model_config, parts_on_disk, stored_names
from moeq.model.sequences import SourceAndTarget, answered

_EXPERTS = re.compile(r"(?:layers\.\d+|block\.\d+\.layer\.\d+)\.(?:[^.]+\.)?experts$")
"""Matches the module of a layer's routed experts."""


class WholeModel:
    """A model of transformers, in float32, whose experts can be exchanged.

    Args:
        source: The original checkpoint.
        device: Where it runs.

    Raises:
        MoeqError: transformers does not know the model, or arranges its experts in another way than
            this class knows.
    """

    def __init__(self, source: SourceModel, device: torch.device) -> None:
        self._model = _load(source).to(device).eval()
        self._names = list(source.reader.tensors)
        self._layers = {layer.index: layer for layer in source.layers}
        self._config = source.reader.config
        self._parts = SourceAndTarget.of(self._config)
        family = source.layers[0].family
        self._experts: dict[int, Any] = {
            family.layer_index(self._config, name): module
            for name, module in self._model.named_modules()
            if _EXPERTS.search(name) and (hasattr(module, "is_transposed") or family.encodes)
        }
        if self._experts.keys() != self._layers.keys():
            raise MoeqError(
                f"{source.folder}: transformers arranges the experts of this model in a way that "
                "moeq does not know; use `backend` reference or vllm"
            )
        self._chosen: dict[str, torch.Tensor] = {}
        for index, module in self._experts.items():
            module.register_forward_pre_hook(self._recorder(index), with_kwargs=True)

    def _recorder(self, index: int) -> Callable[..., None]:
        container = self._layers[index].container

        def record(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            ids = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
            if self._parts is not None:  # one-hot, or zeros beyond an expert's capacity
                ids = torch.where(ids.any(-1), ids.argmax(-1), -1)
            self._chosen[container] = ids.cpu()

        return record

    @torch.inference_mode()
    def fill(self, source: ExpertSource) -> None:
        """Give every expert the weights of a source."""
        for index, layer in self._layers.items():
            experts = self._experts[index]
            if self._parts is not None:
                for expert in range(layer.num_experts):
                    w13, w2, *_ = source.matrices(layer, expert)
                    experts[f"expert_{expert}"].wi.weight.copy_(w13)
                    experts[f"expert_{expert}"].wo.weight.copy_(w2)
                continue
            first = experts.gate_up_proj if experts.has_gate else experts.up_proj
            for expert in range(layer.num_experts):
                w13, w2, *_ = source.matrices(layer, expert)
                if experts.has_gate and not experts.is_concatenated:  # their rows alternate
                    w13 = torch.stack(w13.chunk(2), 1).flatten(0, 1)
                first[expert].copy_(w13.T if experts.is_transposed else w13)
                experts.down_proj[expert].copy_(w2.T if experts.is_transposed else w2)

    @torch.inference_mode()
    def fill_linear(self, weights: Weights) -> None:
        """Give dense layers other weights, by their names on disk.

        Raises:
            MoeqError: transformers has no place for one; names it.
        """
        ours, parts = stored_names(self._model, self._names), parts_on_disk(self._model)
        filled = set()
        for name, tensor in self._model.state_dict().items():
            names = parts.get(name, [name])
            for part, target in zip(names, tensor.chunk(len(names)), strict=True):
                if (stored := ours.get(part, "")) in weights:
                    target.copy_(weights[stored])
                    filled.add(stored)
        for stored in weights.keys() - filled:
            raise MoeqError(
                f"{stored} has no place in the model of transformers; use `backend` reference"
            )

    @torch.inference_mode()
    def outputs(self, tokens: torch.Tensor) -> Iterator[Output]:
        """Yield for each sequence of tokens int64 [n, L] what the model says."""
        for sequence in tokens.to(self._model.device):
            result = self._model(**self._inputs(sequence), use_cache=False)
            yield Output.of(result.logits[0], dict(self._chosen))

    def _inputs(self, sequence: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._parts is None:
            return {"input_ids": sequence[None]}
        places = slice(self._parts.source_length(len(sequence)))
        return {
            "input_ids": sequence[None, places],
            "attention_mask": self._parts.kept(sequence[None])[:, places].long(),
            "decoder_input_ids": sequence[None, answered(self._config, sequence)],
        }


def _load(source: SourceModel) -> Any:
    """Return the model in float32.

    What is in lower precision is dequantized by us: without a GPU, transformers reads few of these
    formats, and leaves weights of some uninitialised.
    """
    config = model_config(source.folder)
    auto = auto_class(config)
    if source.precision is None:
        return auto.from_pretrained(
            source.folder, config=config, dtype=torch.float32, trust_remote_code=False
        )
    for part in (config, config.get_text_config()):
        for key in QUANTIZATION_KEYS:
            vars(part).pop(key, None)
    with torch.device("meta"):
        model_class = type(auto.from_config(config, trust_remote_code=False))
    tensors = dict(in_16_bits(CheckpointReader(source.folder)))
    return model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
