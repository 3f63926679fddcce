"""Runs a checkpoint one decoder layer at a time: a model larger than memory can be calibrated.

The layers are those of transformers, in float32. Only the routed experts are run here, one after
another, so that the caller decides which weights they have and sees what reaches them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moeq.checkpoint.families import Matrix, MoELayer
from moeq.checkpoint.source import SourceModel
from moeq.errors import MoeqError
from moeq.model.architecture import auto_class, model_config, stored_names

_TOKENS_AT_ONCE = 2048
"""Of whole sequences, at least one: many calls of short ones cost more than their arithmetic."""


class Routed(NamedTuple):
    """What the experts of one layer get, for all tokens.

    Attributes:
        x: float32 [T, hidden_size].
        ids: int64 [T, top_k].
        weights: float32 [T, top_k], as the experts' outputs are multiplied with.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def of_expert(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens that an expert gets: their places [n] and router weights [n, 1]."""
        places, turns = (self.ids == expert).nonzero(as_tuple=True)
        return places, self.weights[places, turns].unsqueeze(1)


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


class LayerwiseModel:
    """The layers of a checkpoint, to be run in order on the same sequences.

    Args:
        source: The checkpoint.
        device: Where layers run.

    Raises:
        MoeqError: transformers does not know the model, or its layers do more with experts than
            to send tokens there and to add up what they give.
    """

    def __init__(self, source: SourceModel, device: torch.device) -> None:
        reason = source.layers[0].family.not_layerwise
        if reason:
            raise MoeqError(
                f"{source.folder}: {source.reader.config['model_type']} {reason}, which moeq "
                "cannot run layer by layer. Plan and quantize with `--calib none`, evaluate with "
                "`--backend transformers` or vllm"
            )
        self.source, self.device = source, device
        self.moe_layers = {layer.index: layer for layer in source.layers}
        config = model_config(source.folder)
        config.get_text_config().output_router_logits = False  # there is nothing to balance here
        with torch.device("meta"):
            self._model = auto_class(config).from_config(config, dtype=torch.float32).eval()
        self._body, self._head = self._model.get_decoder(), self._model.get_output_embeddings()
        modules = self._model.named_modules()
        self._prefix = next(f"{name}." for name, module in modules if module is self._body)
        self.hidden_size = source.hidden_size
        self._make_rotary_embeddings()
        self._layers: list[nn.Module] = list(self._body.layers)
        first = self._layers[source.layers[0].index]
        self._experts = _experts_path(first)
        self._experts_of_transformers: Any = first.get_submodule(self._experts)
        # Granite adds a fraction of what its blocks give to the residual stream.
        self._residual_multiplier = getattr(config.get_text_config(), "residual_multiplier", 1.0)
        self._arguments: list[dict[str, Any]] = []
        self._exit: _Exit | None = None
        self._stored = stored_names(self._model, source.reader.tensors)

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
        """Start with sequences: write their embeddings to ``hidden``.

        Args:
            tokens: int64 [n, L]; all sequences are full, none is padded.
            hidden: float32 [n, L, hidden_size].
        """
        entrances = [_Entrance(layer) for layer in self._layers]
        self._body.layers = nn.ModuleList(entrances)
        for name, module in self._body.named_children():
            if name != "layers":
                self._fill(module, f"{self._prefix}{name}.")
        for sequence, target in zip(tokens, hidden, strict=True):
            self._body(input_ids=sequence[None].to(self.device), use_cache=False)
            target.copy_(entrances[0].hidden[0])
        self._arguments = [entrance.arguments for entrance in entrances]
        self._body.get_input_embeddings().to("meta")

    @torch.no_grad()
    def run(self, index: int, hidden: torch.Tensor, x: torch.Tensor) -> Routed | None:
        """Run one layer in place, all but its routed experts.

        Args:
            index: Which layer.
            hidden: float32 [n, L, hidden_size]: input, and then output, to which the experts'
                share has to be added.
            x: Memory of the same shape for the result.

        Returns:
            What the experts get; None for a layer without experts.
        """
        layer = self._layers[index]
        moe, router = self.moe_layers.get(index), _Recorder()
        if moe is not None:
            layer.set_submodule(self._experts, router)
        self._fill(layer, f"{self._prefix}layers.{index}.")
        ids, weights = [], []
        size = max(1, _TOKENS_AT_ONCE // hidden.shape[1])
        for sequences, target in zip(torch.split(hidden, size), torch.split(x, size), strict=True):
            output = layer(sequences.to(self.device), **self._arguments[index])
            sequences.copy_(output[0] if isinstance(output, tuple) else output)
            if moe is not None:
                target.copy_(router.routed.x.view(target.shape))
                ids.append(router.routed.ids.cpu())
                weights.append(router.routed.weights.float().cpu())
        layer.to("meta")
        if moe is None:
            return None
        shares = torch.cat(weights) * self._residual_multiplier
        return Routed(x.view(-1, x.shape[-1]), torch.cat(ids), shares)

    def backward(self, index: int, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        """Turn the gradient of a layer's output, in place, into that of its input.

        All experts of the layer are in memory at once.

        Args:
            index: Which layer.
            hidden: float32 [n, L, hidden_size]: its input.
            gradient: Of the same shape.
        """
        layer, moe = self._layers[index], self.moe_layers.get(index)
        if moe is not None:
            layer.set_submodule(self._experts, _Experts(self, moe))
        self._fill(layer, f"{self._prefix}layers.{index}.")
        with torch.enable_grad():
            for sequence, target in zip(hidden, gradient, strict=True):
                inputs = sequence[None].to(self.device, copy=True).requires_grad_()
                output = layer(inputs, **self._arguments[index])
                output = output[0] if isinstance(output, tuple) else output
                (of_input,) = torch.autograd.grad(output, inputs, target[None].to(self.device))
                target.copy_(of_input[0])
        if moe is not None:
            layer.set_submodule(self._experts, _Recorder())
        layer.to("meta")

    def check_finite(self, index: int, hidden: torch.Tensor) -> None:
        """Check what a layer gives.

        Raises:
            MoeqError: It is not finite.
        """
        if not torch.isfinite(hidden).all():
            raise MoeqError(
                f"{self.source.folder}: layer {index} gives NaN or infinity on the calibration "
                "text; are its weights finite?"
            )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the last layer's output [L, hidden_size] says: logits [L, V]."""
        if self._exit is None:
            self._exit = _Exit(self._layers[-1])
            self._body.layers = nn.ModuleList([self._exit])
            self._fill(self._head, "lm_head.")
        self._exit.output = hidden.to(self.device)[None]
        # transformers' own end of the model: some scale the logits, or cap them.
        output = self._model(inputs_embeds=self._exit.output, use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits

    def expert_output(self, matrices: ExpertMatrices, x: torch.Tensor) -> torch.Tensor:
        """Return what an expert gives for tokens x [n, hidden_size]."""
        return F.linear(self.expert_hidden(matrices, x), matrices.w2, matrices.w2_bias)

    def expert_hidden(self, matrices: ExpertMatrices, x: torch.Tensor) -> torch.Tensor:
        """Return what an expert's down projection gets for tokens x [n, hidden_size]."""
        experts = self._experts_of_transformers
        output = F.linear(x, matrices.w13, matrices.w13_bias)
        if experts.has_gate and not experts.is_concatenated:
            gate, up = output.chunk(2, -1)
            output = torch.stack([gate, up], -1).flatten(-2)  # they alternate
        activation = experts._apply_gate if experts.has_gate else experts.act_fn
        result: torch.Tensor = activation(output)
        return result

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

    def _make_rotary_embeddings(self) -> None:
        """Make what has no tensors on disk, so that it is not left on the meta device."""
        for name, module in list(self._body.named_children()):
            if "Rotary" in type(module).__name__:
                with torch.device(self.device):
                    setattr(self._body, name, type(module)(config=module.config))

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module of the model its tensors from the checkpoint.

        Raises:
            MoeqError: transformers builds another model than the checkpoint holds.
        """
        state = {}
        for name in module.state_dict():
            tensor = self.source.tensor(self._stored_name(prefix + name)).to(self.device)
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
        module.load_state_dict(state, assign=True)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_meta:
                raise MoeqError(
                    f"{self.source.folder}: {prefix}{name} is not in the checkpoint, but "
                    "transformers needs it"
                )

    def _stored_name(self, name: str) -> str:
        """Return where a parameter is on disk; one that is missing is named as in memory."""
        if name == "lm_head.weight" and name not in self._stored:  # tied
            name = f"{self._prefix}embed_tokens.weight"
        return self._stored.get(name, name)


def _experts_path(layer: nn.Module) -> str:
    """Return where the routed experts are in a decoder layer of transformers."""
    names: list[str] = [name for name, _ in layer.named_modules()]
    return next(name for name in names if name.split(".")[-1] == "experts")


class _Entrance(nn.Module):
    """Stands for a layer and remembers what it would have got."""

    hidden: torch.Tensor
    arguments: dict[str, Any]

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # not a submodule

    def __getattr__(self, name: str) -> Any:
        """Return what the model asks a layer about itself, such as its kind of attention."""
        return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states


class _Exit(_Entrance):
    """Stands for all layers, once they have run: gives what the last one gave."""

    output: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return self.output


class _Experts(nn.Module):
    """The experts of a layer, with gradients of what they get."""

    def __init__(self, model: LayerwiseModel, layer: MoELayer) -> None:
        super().__init__()
        self._model = (model,)  # not a submodule
        self._matrices = [model.matrices(layer, expert) for expert in range(layer.num_experts)]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        routed = Routed(hidden_states, top_k_index, top_k_weights)
        result = torch.zeros_like(hidden_states)
        for expert, matrices in enumerate(self._matrices):
            places, weights = routed.of_expert(expert)
            output = self._model[0].expert_output(matrices, hidden_states[places])
            result = result.index_add(0, places, output * weights)
        return result


class _Recorder(nn.Module):
    """Stands for the experts: remembers what they get and gives zeros."""

    routed: Routed

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.routed = Routed(hidden_states, top_k_index, top_k_weights)
        return torch.zeros_like(hidden_states)
