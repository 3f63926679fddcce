"""Runs a checkpoint one decoder layer at a time: a model larger than memory can be calibrated.

The layers are those of transformers, in float32. Only the routed experts are run here, one after
another, so that the caller decides which weights they have and sees what reaches them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from moeq.checkpoint.families import MoELayer
from moeq.checkpoint.source import SourceModel, opened
from moeq.errors import MoeqError
from moeq.model.architecture import model_config, not_layerwise
from moeq.model.ends import ModelEnds
from moeq.model.expert_forward import activation_of, expert_hidden, expert_output
from moeq.model.stand_ins import Experts, Recorder, Routed
from moeq.model.stored import NO_WEIGHTS, ExpertMatrices, Weights
from moeq.model.watch import NO_WATCH, AllSeen, Watch, ending_when_seen

TOKENS_AT_ONCE = 2048
"""Of whole sequences, at least one: many calls of short ones cost more than their arithmetic."""


class LayerwiseModel(ModelEnds):
    """The layers of a checkpoint, to be run in order on the same sequences.

    A layer with experts is run in three steps, all of which :func:`moeq.model.run_layer` does:
    :meth:`run_without_experts` returns what the experts get, the caller adds what they give, their
    shares, to ``sums``, and :meth:`finish` makes the output of the layer of it.

    Args:
        source: The checkpoint.
        device: Where layers run.

    Attributes:
        adds_up: Whether a layer gives what it would without experts, plus their shares: these are
            added straight to its output then. Else, where a norm follows the experts, their sum is
            kept apart, and the layer runs a second time once that is known.

    Raises:
        MoeqError: transformers does not know the model, or its layers get more than what the one
            before has given.
    """

    def __init__(self, source: SourceModel, device: torch.device) -> None:
        family, config = source.layers[0].family, model_config(source.folder)
        text_config = config.get_text_config()
        reason = not_layerwise(text_config, family)
        if reason:
            raise MoeqError(
                f"{source.folder}: {source.reader.config['model_type']} {reason}, which moeq "
                "cannot run layer by layer. Plan and quantize with `--calib none`, evaluate with "
                "`--backend transformers` or vllm"
            )
        text_config.output_router_logits = False  # there is nothing to balance here
        super().__init__(source, device, config)
        self.adds_up = not family.normalized
        self.moe_layers = {layer.index: layer for layer in source.layers}
        self.hidden_size = source.hidden_size
        first = self._layers[source.layers[0].index]
        self._activation = activation_of(first.get_submodule(_experts_path(first)))
        # Granite adds a fraction of what its blocks give to the residual stream.
        self._residual_multiplier = getattr(text_config, "residual_multiplier", 1.0)

    def __len__(self) -> int:
        return len(self._layers)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to other processes as the checkpoint that it was made from."""
        return _made, (type(self), *self.source.opened_from, self.device.type)

    def on(self, device: torch.device) -> "LayerwiseModel":
        """Return the same model with its experts on another device; only they can run there."""
        if device == self.device:
            return self
        result: LayerwiseModel = object.__new__(type(self))  # copy.copy makes it anew, as pickle
        result.__dict__.update(self.__dict__, device=device)
        return result

    @torch.no_grad()
    def run_without_experts(
        self,
        index: int,
        hidden: torch.Tensor,
        x: torch.Tensor,
        sums: torch.Tensor,
        weights: Weights = NO_WEIGHTS,
    ) -> Routed | None:
        """Run one layer, all but its routed experts; if it has any, :meth:`finish` has to follow.

        Args:
            index: Which layer.
            hidden: float32 [n, L, hidden_size]: input, and the output of a layer without experts.
            x: Buffer of the same shape, of which the result is a view.
            sums: Becomes what the experts' shares have to be added to: ``hidden`` itself where the
                model adds up, else another buffer of the same shape.
            weights: Of dense layers, for those of the checkpoint.

        Returns:
            What the experts get; None for a layer without experts.
        """
        has_experts, size = index in self.moe_layers, self._batch_size(hidden)
        recorder = Recorder(x, size)

        def give(routed: Routed) -> torch.Tensor:
            recorder.add(routed)
            return torch.zeros_like(routed.x)

        with self._loaded(index, give, weights) as layer:
            for sequences in torch.split(hidden, size):
                output = layer(sequences.to(self.device))
                if self.adds_up or not has_experts:
                    sequences.copy_(output)
        if not has_experts:
            return None
        if not self.adds_up:
            sums.zero_()
        return recorder.all(self._residual_multiplier)

    @torch.no_grad()
    def finish(
        self, index: int, hidden: torch.Tensor, sums: torch.Tensor, weights: Weights = NO_WEIGHTS
    ) -> None:
        """Turn ``hidden``, in place, into the output of a layer with experts.

        Args:
            index: Which layer; :meth:`run_without_experts` has just run it.
            hidden: float32 [n, L, hidden_size], as it has left that.
            sums: As it has left them, and the experts' shares.
            weights: As it got them.
        """
        if self.adds_up:
            return
        size = self._batch_size(hidden)
        parts = iter(torch.split(sums, size))

        def give(routed: Routed) -> torch.Tensor:
            return next(parts).to(self.device).view_as(routed.x)

        with self._loaded(index, give, weights) as layer:
            for sequences in torch.split(hidden, size):
                sequences.copy_(layer(sequences.to(self.device)))

    @torch.no_grad()
    def watch(self, index: int, hidden: torch.Tensor, weights: Weights, watch: Watch) -> None:
        """Run one layer without its routed experts, as far as it takes to see dense layers' inputs.

        Args:
            index: Which layer; their number is the end of the model, with its head.
            hidden: float32 [n, L, hidden_size]: input, which stays as it is.
            weights: As in :meth:`run_without_experts`.
            watch: Gets inputs and outputs, of some sequences at a time.
        """
        if index == len(self):
            for sequence in hidden:
                self.logits(sequence, weights, watch)
            return
        watch, start = ending_when_seen(watch)
        with self._loaded(index, lambda routed: torch.zeros_like(routed.x), weights, watch) as run:
            for sequences in torch.split(hidden, self._batch_size(hidden)):
                start()
                with suppress(AllSeen):
                    run(sequences.to(self.device))

    def backward(
        self,
        index: int,
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        x: torch.Tensor,
        of_sums: torch.Tensor,
        watch: Watch = NO_WATCH,
    ) -> Routed | None:
        """Turn the gradient of a layer's output, in place, into that of its input.

        All experts of the layer are in memory at once.

        Args:
            index: Which layer.
            hidden: float32 [n, L, hidden_size]: its input.
            gradient: Of the same shape.
            x: Memory of the same shape for the result.
            of_sums: Becomes the gradient of the sums of the experts' shares; without experts, that
                of the output.
            watch: Gets inputs and outputs of dense layers, before the backward pass.

        Returns:
            What the experts get; None for a layer without experts.
        """
        moe = self.moe_layers.get(index)
        experts = [] if moe is None else [self.matrices(moe, i) for i in range(moe.num_experts)]
        sums: list[torch.Tensor] = []
        size = self._batch_size(hidden)
        recorder = Recorder(x, size)

        def give(routed: Routed) -> torch.Tensor:
            recorder.add(routed)
            result = torch.zeros_like(routed.x)
            for expert, matrices in enumerate(experts):
                places, weights = routed.of_expert(expert)
                output = self.expert_output(matrices, routed.x[places])
                result = result.index_add(0, places, output * weights)
            sums.append(result)
            return result

        of_sums.copy_(gradient)
        parts = (torch.split(part, size) for part in (hidden, gradient, of_sums))
        with self._loaded(index, give, watch=watch) as layer, torch.enable_grad():
            for sequences, target, of_sum in zip(*parts, strict=True):
                inputs = sequences.to(self.device, copy=True).requires_grad_()
                output = layer(inputs)
                of_output = target.to(self.device)
                of_input, *rest = torch.autograd.grad(output, (inputs, *sums), of_output)
                if moe is not None:  # first, since it may be the memory of the other one
                    # As the shares are times it.
                    of_sum.copy_(rest[0].view(of_sum.shape) / self._residual_multiplier)
                    sums.clear()
                target.copy_(of_input)
        return None if moe is None else recorder.all(self._residual_multiplier)

    @contextmanager
    def _loaded(
        self,
        index: int,
        give: Callable[[Routed], torch.Tensor],
        weights: Weights = NO_WEIGHTS,
        watch: Watch = NO_WATCH,
    ) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Give a layer its tensors, and what stands for its experts, to run it on sequences."""
        layer, moe = self._layers[index], self.moe_layers.get(index)
        experts = "" if moe is None else _experts_path(layer)
        if moe is not None:
            layer.set_submodule(experts, self._stand_in(moe, give))
        prefix = self._names[layer]
        self._fill(layer, prefix, weights)
        with self._watched(layer, watch):
            yield self._runner(index)
        if moe is not None:
            layer.set_submodule(experts, nn.Module())  # what stood there may hold memory
        layer.to("meta")

    def _stand_in(self, moe: MoELayer, give: Callable[[Routed], torch.Tensor]) -> nn.Module:
        """Return what stands for the experts of a layer."""
        return Experts(moe, give)

    def _runner(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what runs a layer on sequences, which come one after another, in their order."""
        args, kwargs = self._entrances[index].arguments

        def run(hidden: torch.Tensor) -> torch.Tensor:
            output = self._layers[index](hidden, *args, **kwargs)
            result: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return result

        return run

    @staticmethod
    def _batch_size(hidden: torch.Tensor) -> int:
        return max(1, TOKENS_AT_ONCE // hidden.shape[1])

    def check_finite(self, index: int, hidden: torch.Tensor) -> None:
        """Check what a layer gives.

        Raises:
            MoeqError: It is not finite.
        """
        if not torch.isfinite(hidden.sum()):  # without as much memory again
            raise MoeqError(
                f"{self.source.folder}: layer {index} gives NaN or infinity on the calibration "
                "text; are its weights finite?"
            )

    @torch.no_grad()
    def normalized(self, layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
        """Return what the norm in front of a layer's experts gives for x [n, hidden_size].

        It is x itself where there is no such norm.

        Raises:
            MoeqError: The norm is not in the checkpoint.
        """
        if not layer.family.norm:
            return x
        norm = self._norm(layer)
        self._fill(norm, self._names[norm])
        result: torch.Tensor = norm(x)
        norm.to("meta")
        return result

    def _norm(self, layer: MoELayer) -> nn.Module:
        norm: nn.Module = self._layers[layer.index].get_submodule(layer.family.norm)
        return norm

    def expert_output(self, matrices: ExpertMatrices, x: torch.Tensor) -> torch.Tensor:
        """Return what an expert gives for tokens x [n, hidden_size]."""
        return expert_output(matrices, x, self._activation)

    def expert_hidden(self, matrices: ExpertMatrices, x: torch.Tensor) -> torch.Tensor:
        """Return what an expert's down projection gets for tokens x [n, hidden_size]."""
        return expert_hidden(matrices, x, self._activation)


@lru_cache(maxsize=1)
def _made(
    kind: type[LayerwiseModel], folder: str, name: str, stamp: str, device: str
) -> LayerwiseModel:
    """Return a model that another process has made, the same for equal calls."""
    return kind(opened(folder, name, stamp), torch.device(device))


def _experts_path(layer: nn.Module) -> str:
    """Return where the routed experts are in a decoder layer of transformers."""
    names: list[str] = [name for name, _ in layer.named_modules()]
    return next(name for name in names if name.split(".")[-1] == "experts")
