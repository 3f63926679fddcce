"""Begins and ends a run of the layers of a model: embeddings before them, norm and head behind."""

import inspect
from typing import Any

import torch
from torch import nn

from moeq.checkpoint.source import SourceModel
from moeq.errors import MoeqError
from moeq.model.stand_ins import AllTokens, Entrance, Exit
from moeq.model.stored import NO_WEIGHTS, StoredModel, Weights
from moeq.model.watch import NO_WATCH, Watch


class ModelEnds(StoredModel):
    """A model without its layers, for which others stand that remember what each would have got.

    Args:
        source: The checkpoint.
        device: Where parts run.
        config: Of the model, in transformers.
    """

    def __init__(self, source: SourceModel, device: torch.device, config: Any) -> None:
        super().__init__(source, device, config)
        self._config = config.get_text_config()
        self._body, self._head = self._bodies()[-1], self._model.get_output_embeddings()
        self._prefix, self._head_prefix = self._names[self._body], self._names[self._head]
        self._layers: list[Any] = [layer for body in self._bodies() for layer in _layers(body)]
        first = self._layers[source.layers[0].index]
        # GLM's attention uses the tokens again that an earlier layer has chosen.
        self._in_tuple = "prev_topk_indices" in inspect.signature(type(first).forward).parameters
        self._choosing_again = [
            layer.self_attn
            for layer in self._layers
            if self._in_tuple and layer.self_attn.skip_topk
        ]
        for attention in self._choosing_again:
            attention.indexer = AllTokens()
        self._entrances = self._stand_ins()
        self._exit: Entrance | None = None
        self._heads: dict[int, tuple[Weights, Weights]] = {}

    def _bodies(self) -> list[Any]:
        """Return what holds layers, in the order in which they run."""
        body = self._model.get_decoder()
        return [body if hasattr(body, "layers") else body.model]  # Llama-4's has a head

    def _stand_ins(self) -> list[Entrance]:
        """Return what stands for each layer."""
        return [Entrance(layer, self._in_tuple) for layer in self._layers]

    @torch.no_grad()
    def embed(
        self, tokens: torch.Tensor, hidden: torch.Tensor, weights: Weights = NO_WEIGHTS
    ) -> None:
        """Start with sequences: write their embeddings to ``hidden``.

        Args:
            tokens: int64 [n, L]; all sequences are full, none is padded.
            hidden: float32 [n, L, hidden_size].
            weights: Of embeddings, for those of the checkpoint.

        Raises:
            MoeqError: Attention chooses tokens of such long sequences, and layers share the choice.
        """
        if self._choosing_again and tokens.shape[1] > self._config.index_topk:
            raise MoeqError(
                f"{self.source.folder}: layers share what attention chooses of sequences of more "
                f"than {self._config.index_topk} tokens (index_topk), which moeq cannot run layer "
                f"by layer. Give a `seqlen` of at most {self._config.index_topk}"
            )
        self._body.layers = nn.ModuleList(self._entrances)
        for name, module in self._body.named_children():
            if name != "layers":
                self._fill(module, f"{self._prefix}{name}.", weights)
        for sequence, target in zip(tokens, hidden, strict=True):
            self._body(input_ids=sequence[None].to(self.device), use_cache=False)
            target.copy_(self._entrances[0].hidden[0])
        embeddings = self._body.get_input_embeddings()
        # Gemma-4 looks for those of images among hidden states: without memory, equal to nothing.
        nothing = torch.tensor(torch.nan, device=self.device).expand_as(embeddings.weight)
        embeddings.weight = nn.Parameter(nothing, requires_grad=False)
        self._exit = None  # entrances are where it was

    def logits(
        self, hidden: torch.Tensor, weights: Weights = NO_WEIGHTS, watch: Watch = NO_WATCH
    ) -> torch.Tensor:
        """Return what the last layer's output [L, hidden_size] says: logits [L, V].

        Args:
            hidden: That output.
            weights: Of the head, for that of the checkpoint; the same object is read once.
            watch: Gets inputs and outputs of the head.
        """
        if self._exit is None:
            self._exit = self._leave()
            self._heads.clear()
        if id(weights) not in self._heads:
            self._fill(self._head, self._head_prefix, weights)
            self._heads[id(weights)] = weights, self._head.state_dict()
        self._head.load_state_dict(self._heads[id(weights)][1], assign=True)
        self._exit.hidden = hidden.to(self.device)[None]
        with self._watched(self._head, watch):
            # transformers' own end of the model: some scale the logits, or cap them.
            output = self._model(**self._last_inputs(self._exit.hidden), use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _leave(self) -> Entrance:
        """Return what stands for all layers in the model from now on."""
        end = Exit(self._layers[-1], self._in_tuple)
        self._body.layers = nn.ModuleList([end])
        return end

    @staticmethod
    def _last_inputs(hidden: torch.Tensor) -> dict[str, Any]:
        """Return what the model gets, once nothing but its end looks at it."""
        return {"inputs_embeds": hidden}

    def _stored_name(self, name: str) -> str:
        """Return where a parameter is on disk; one that is missing is named as in memory."""
        if name == f"{self._head_prefix}weight" and name not in self._stored:  # tied
            name = f"{self._prefix}embed_tokens.weight"
        return super()._stored_name(name)


def _layers(body: Any) -> Any:
    return body.block if hasattr(body, "block") else body.layers
