"""Runs a checkpoint one decoder layer at a time: a model larger than memory can be calibrated.

The layers are those of transformers, in float32. Only the routed experts are run here, one after
another, so that the caller decides which weights they have and sees what reaches them.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moeq.checkpoint.families import MoELayer
from moeq.checkpoint.source import SourceModel
from moeq.errors import MoeqError

_MOE_MODULE = "mlp"
"""Name of the MoE block inside a decoder layer of transformers 5, for every family."""
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
    """float32 weights of one expert: gate and up [I, H], down [H, I]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class LayerwiseModel:
    """The layers of a checkpoint, to be run in order on the same sequences.

    Args:
        source: The checkpoint.
        device: Where layers run.
    """

    def __init__(self, source: SourceModel, device: torch.device) -> None:
        # Takes seconds to import, which other commands should not wait for.
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.activations import ACT2FN

        self.source, self.device = source, device
        self.moe_layers = {layer.index: layer for layer in source.layers}
        config = AutoConfig.from_pretrained(source.folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self._body, self._head = model.model.eval(), model.lm_head
        self.hidden_size = source.hidden_size
        with torch.device(device):
            self._body.rotary_emb = type(self._body.rotary_emb)(config=config)
        self._layers: list[nn.Module] = list(self._body.layers)
        self._activation = ACT2FN[config.hidden_act]
        self._arguments: list[dict[str, Any]] = []
        first = source.layers[0]
        self._prefix = first.container.removesuffix(f"{first.index}.{first.family.experts}")
        # "model.layers." holds the layers, "model." what is around them.
        self._around = self._prefix.removesuffix("layers.")

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
        """Start with sequences: write their embeddings to ``hidden``.

        Args:
            tokens: int64 [n, L]; all sequences are full, none is padded.
            hidden: float32 [n, L, hidden_size].
        """
        entrances = [_Entrance() for _ in self._layers]
        self._body.layers = nn.ModuleList(entrances)
        self._fill(self._body.embed_tokens, f"{self._around}embed_tokens.")
        self._fill(self._body.norm, f"{self._around}norm.")
        for sequence, target in zip(tokens, hidden, strict=True):
            self._body(input_ids=sequence[None].to(self.device), use_cache=False)
            target.copy_(entrances[0].hidden[0])
        self._arguments = [entrance.arguments for entrance in entrances]
        self._body.embed_tokens.to("meta")

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
            getattr(layer, _MOE_MODULE).experts = router
        self._fill(layer, f"{self._prefix}{index}.", moe)
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
        return Routed(x.view(-1, x.shape[-1]), torch.cat(ids), torch.cat(weights))

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
            getattr(layer, _MOE_MODULE).experts = _Experts(self, moe)
        self._fill(layer, f"{self._prefix}{index}.", moe)
        with torch.enable_grad():
            for sequence, target in zip(hidden, gradient, strict=True):
                inputs = sequence[None].to(self.device, copy=True).requires_grad_()
                output = layer(inputs, **self._arguments[index])
                output = output[0] if isinstance(output, tuple) else output
                (of_input,) = torch.autograd.grad(output, inputs, target[None].to(self.device))
                target.copy_(of_input[0])
        if moe is not None:
            getattr(layer, _MOE_MODULE).experts = _Recorder()
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
        if self._head.weight.is_meta:
            name = "lm_head.weight"
            if name not in self.source.reader.tensors:  # tied
                name = f"{self._around}embed_tokens.weight"
            weight = self.source.tensor(name).to(self.device).float()
            self._head.load_state_dict({"weight": weight}, assign=True)
        logits: torch.Tensor = self._head(self._body.norm(hidden.to(self.device)))
        return logits

    def expert_output(self, matrices: ExpertMatrices, x: torch.Tensor) -> torch.Tensor:
        """Return what an expert gives for tokens x [n, hidden_size]."""
        return F.linear(self.expert_hidden(matrices.gate, matrices.up, x), matrices.down)

    def expert_hidden(self, gate: torch.Tensor, up: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return what an expert's down projection gets for tokens x [n, hidden_size]."""
        activated: torch.Tensor = self._activation(F.linear(x, gate))
        return activated * F.linear(x, up)

    def matrices(self, layer: MoELayer, expert: int) -> ExpertMatrices:
        """Read an expert's 16- or 32-bit weights.

        Raises:
            MoeqError: They are not finite; names the tensor.
        """
        names = (layer.tensor_name(expert, matrix) for matrix in ("gate", "up", "down"))
        return ExpertMatrices(*map(self._finite, names))

    def _finite(self, name: str) -> torch.Tensor:
        tensor = self.source.tensor(name).to(self.device).float()
        if not torch.isfinite(tensor).all():
            raise MoeqError(
                f"{self.source.folder}: cannot quantize {name}: weights are NaN or infinite"
            )
        return tensor

    def _fill(self, module: nn.Module, prefix: str, moe: MoELayer | None = None) -> None:
        """Give a module its tensors from the checkpoint.

        Raises:
            MoeqError: transformers builds another model than the checkpoint holds.
        """
        state = {}
        for name in module.state_dict():
            stored = name
            if moe is not None:  # Mixtral's checkpoints have another name for the block
                block = moe.family.experts.split(".")[0]
                stored = name.replace(f"{_MOE_MODULE}.", f"{block}.", 1)
            tensor = self.source.tensor(prefix + stored).to(self.device)
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
        module.load_state_dict(state, assign=True)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_meta:
                raise MoeqError(
                    f"{self.source.folder}: {prefix}{name} is not in the checkpoint, but "
                    "transformers needs it"
                )


class _Entrance(nn.Module):
    """Stands for a layer and remembers what it would have got."""

    hidden: torch.Tensor
    arguments: dict[str, Any]

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states


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
