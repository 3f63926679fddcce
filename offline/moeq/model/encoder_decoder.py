"""Runs an encoder and its decoder one layer at a time, as if they were one model.

The hidden states of a sequence [L, hidden_size] are those of the source, which the layers of the
encoder change, and behind them those of the target, which the layers of the decoder change while
they look at the others. What a layer does not change gets no experts there, nor does padding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moeq.checkpoint.families import MoELayer
from moeq.checkpoint.source import SourceModel
from moeq.model.layerwise import LayerwiseModel
from moeq.model.sequences import SourceAndTarget
from moeq.model.stand_ins import BlockEntrance, BlockExit, Entrance, Routed, SwitchExperts
from moeq.model.stored import NO_WEIGHTS, Weights


def layerwise_model(source: SourceModel, device: torch.device) -> LayerwiseModel:
    """Return what runs the layers of a checkpoint; arguments and errors are those of its class."""
    runs = EncoderDecoderModel if source.layers[0].family.encodes else LayerwiseModel
    return runs(source, device)


class EncoderDecoderModel(LayerwiseModel):
    """The layers of a Switch Transformer: those of the encoder, then those of its decoder.

    Args:
        source: The checkpoint.
        device: Where layers run.

    Raises:
        MoeqError: transformers does not know the model, or its ``config.json`` does not name
            the start token of the decoder and the padding token.
    """

    def __init__(self, source: SourceModel, device: torch.device) -> None:
        super().__init__(source, device)
        parts = SourceAndTarget.of(source.reader.config)
        assert parts is not None
        self._sequences = parts
        self._encoder, self._decoder = self._bodies()
        self._layers_of_encoder = len(self._encoder.block)
        self._kept = torch.empty(0)  # bool [n, L]: which tokens of all sequences are no padding
        self._encoded = torch.empty(0)  # stands for the encoder's output among arguments
        self._running = slice(0), self._kept  # what the layer changes, and which of it is kept

    def _bodies(self) -> list[Any]:
        return [self._model.encoder, self._model.decoder]

    def _stand_ins(self) -> list[Any]:
        return [BlockEntrance(layer) for layer in self._layers]

    @torch.no_grad()
    def embed(
        self, tokens: torch.Tensor, hidden: torch.Tensor, weights: Weights = NO_WEIGHTS
    ) -> None:
        """Start with sequences, as :class:`SourceAndTarget` makes them; see the base class."""
        tokens = tokens.to(self.device)
        places = self._sequences.source_length(tokens.shape[1])
        self._kept = self._sequences.kept(tokens)
        self._encoded = torch.zeros(len(tokens), places, self.hidden_size, device=self.device)
        mask = self._kept[:, :places].long()
        of_source = {"encoder_hidden_states": self._encoded, "encoder_attention_mask": mask}
        last = self._layers_of_encoder
        for stack, span, layers, arguments in (
            (self._encoder, slice(0, places), slice(0, last), {"attention_mask": mask}),
            (self._decoder, slice(places, None), slice(last, None), of_source),
        ):
            for name, module in stack.named_children():
                if name != "block":
                    self._fill(module, f"{self._names[stack]}{name}.", weights)
            entrances = self._entrances[layers]
            bias = self._position_bias(layers.start, tokens[:, span].shape[1])
            for entrance in entrances:
                entrance.position_bias = bias
            stack.block = nn.ModuleList(entrances)
            stack(input_ids=tokens[:, span], use_cache=False, **arguments)
            hidden[:, span] = entrances[0].hidden.to(hidden.device)
            for entrance in entrances:
                entrance.hidden = torch.empty(0)
            stack.embed_tokens.to("meta")
        self._exit = None

    def _position_bias(self, index: int, length: int) -> torch.Tensor:
        """Return what a stack's first layer computes for the attention of all."""
        layer = self._layers[index]
        attention = layer.layer[0].SelfAttention
        self._fill(attention, f"{self._names[layer]}layer.0.SelfAttention.")
        bias: torch.Tensor = attention.compute_bias(length, length)
        attention.to("meta")
        return bias

    def _stand_in(self, moe: MoELayer, give: Callable[[Routed], torch.Tensor]) -> nn.Module:
        return SwitchExperts(lambda routed: self._given(give, routed))

    def _given(self, give: Callable[[Routed], torch.Tensor], routed: Routed) -> torch.Tensor:
        """Pass on what experts get as if it were of whole sequences."""
        span, kept = self._running
        count, length = kept.shape
        around = (span.start, length - span.stop)
        x = F.pad(routed.x.view(count, -1, routed.x.shape[-1]), (0, 0, *around))
        ids = F.pad(routed.ids.view(count, -1), around, value=-1)
        weights = F.pad(routed.weights.view(count, -1), around)
        given = give(
            Routed(
                x.masked_fill(~kept[..., None], 0).flatten(0, 1),
                ids.masked_fill(~kept, -1).view(-1, 1),
                weights.view(-1, 1),
            )
        )
        return given.view(count, length, -1)[:, span].flatten(0, 1)

    def _runner(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        args, kwargs = self._entrances[index].arguments
        encodes = index < self._layers_of_encoder
        done = 0

        def run(hidden: torch.Tensor) -> torch.Tensor:
            nonlocal done
            # Several sets of experts may run on the same sequences, one set after another.
            rows = torch.arange(done, done + len(hidden), device=self.device) % len(self._kept)
            done += len(hidden)
            places = self._encoded.shape[1]
            source, target = hidden[:, :places], hidden[:, places:]
            span = slice(0, places) if encodes else slice(places, hidden.shape[1])
            self._running = span, self._kept[rows]
            encoded = source if encodes else self._encoder.final_layer_norm(source)

            def of_rows(value: Any) -> Any:
                if value is self._encoded:
                    return encoded
                if isinstance(value, torch.Tensor) and len(value) == len(self._kept):
                    return value[rows]  # a mask; what is alike for all has a single row
                return value

            output, *_ = self._layers[index](
                source if encodes else target,
                *map(of_rows, args),
                **{name: of_rows(value) for name, value in kwargs.items()},
            )
            return torch.cat((output, target) if encodes else (source, output), 1)

        return run

    def _leave(self) -> Entrance:
        end = BlockExit(self._layers[-1])
        self._decoder.block = nn.ModuleList([end])
        return end

    @staticmethod
    def _last_inputs(hidden: torch.Tensor) -> dict[str, Any]:
        from transformers.modeling_outputs import MoEModelOutput  # takes seconds to import

        return {"encoder_outputs": MoEModelOutput(hidden), "decoder_inputs_embeds": hidden}

    def _norm(self, layer: MoELayer) -> nn.Module:
        norm: nn.Module = self._layers[layer.index].layer[-1].get_submodule(layer.family.norm)
        return norm

    def _stored_name(self, name: str) -> str:
        if name not in self._stored:  # tied
            name = self._model.all_tied_weights_keys.get(name, name)
        return super()._stored_name(name)
