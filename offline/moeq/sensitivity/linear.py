"""Dense layers at each width: what each of them does to the loss, and their rounded weights.

As for experts (:mod:`moeq.sensitivity.fisher`): half of the squared products, token by token, of
the gradient with respect to what a layer gives and the error in it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from moeq.checkpoint.atomic import replace_file
from moeq.checkpoint.linear import FULL_WIDTH, INPUT, LinearGroup, linear_widths
from moeq.checkpoint.mapped import MappedFiles
from moeq.model import NO_WEIGHTS, LayerwiseModel, LinearInputs, Watch, Weights
from moeq.rounding import DATA_FREE, LinearWeight
from vllm_moeq.format import BitPlan

Option = tuple[LinearGroup, int, int]
"""A group of dense layers, a group size and a width."""


class LinearBank:
    """Rounded dense layers on disk, and what they do to the model.

    Attributes:
        groups: Those that a plan may choose the width of.

    Args:
        model: Runs the checkpoint.
        groups: As above.
        widths: Below 16 bits, to choose from.
        group_sizes: Weights of a row that share a scale, to choose from.
        method: One of :data:`moeq.rounding.METHODS`; without calibration, to nearest.
        tokens: Of the calibration text.
        folder: Gets a file for each decoder layer.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        groups: Sequence[LinearGroup],
        widths: Sequence[int],
        group_sizes: Sequence[int],
        method: str,
        tokens: int,
        folder: Path,
    ) -> None:
        self.groups, self._widths = tuple(groups), tuple(widths)
        self._model, self._group_sizes, self._method = model, tuple(group_sizes), method
        self._tokens, self._folder, self._files = tokens, folder, MappedFiles()
        self._squares: dict[Option, float] = {}

    def loss(self, group: LinearGroup, group_size: int, bits: int) -> float:
        """Return the increase of the model's divergence from itself, in nats per token."""
        if bits == FULL_WIDTH:
            return 0.0
        return self._squares[group, group_size, bits] / 2 / self._tokens

    def weights(self, plan: BitPlan, device: torch.device) -> Callable[[int], Weights]:
        """Return what gives the rounded weights of a decoder layer, float32, by name."""
        widths = linear_widths(plan)

        def of_layer(index: int) -> Weights:
            names = (name for group in self._of(index) for name in group.weights)
            weights = {
                name: self._read(index, name, plan.group_size, widths[name]).to(device)
                for name in names
                if name in widths
            }
            return weights or NO_WEIGHTS

        return of_layer

    def round(self, index: int, hidden: torch.Tensor) -> None:
        """Round the dense layers of a decoder layer by what they get in the original model.

        Args:
            index: Which decoder layer; or what a group of embeddings has in its place.
            hidden: float32 [n, L, hidden_size]: its input, which stays as it is.

        Raises:
            MoeqError: Weights or activations are not finite; names them.
        """
        groups = self._of(index)
        if not groups or self._file(index).exists():
            return
        inputs = LinearInputs(self._model, groups)
        if self._method not in DATA_FREE and inputs.watch:
            self._model.watch(index, hidden, {}, inputs.watch)
        tensors: dict[str, torch.Tensor] = {}
        for group in groups:
            for name, bits, group_size, rounded in inputs.rounded(
                group, self._widths, self._group_sizes, self._method
            ):
                tensors |= rounded.to("cpu").named(f"{group_size}.{bits}.{name}")
        replace_file(self._file(index), lambda target: save_file(tensors, target))

    def watch(self, index: int) -> Watch:
        """Return what measures the dense layers of a decoder layer on the way back."""
        return {
            name: self._measure(group, name) for group in self._of(index) for name in group.weights
        }

    def measure_embeddings(self, tokens: torch.Tensor, gradient: torch.Tensor) -> None:
        """Measure embeddings, once the way back has come to them.

        Args:
            tokens: int64 [n, L].
            gradient: float32 [n, L, hidden_size], of the first layer's input.
        """
        for group in self._of(INPUT):
            (name,) = group.weights
            own, rounded = torch.empty(2, *gradient.shape)
            self._model.embed(tokens, own)
            for group_size in self._group_sizes:
                for bits in self._widths:
                    weight = self._read(INPUT, name, group_size, bits).to(self._model.device)
                    self._model.embed(tokens, rounded, {name: weight})
                    increase = ((rounded - own) * gradient).sum(-1)
                    self._squares[group, group_size, bits] = float(increase.square().sum())

    def _measure(
        self, group: LinearGroup, name: str
    ) -> Callable[[torch.Tensor, torch.Tensor], None]:
        device = self._model.device
        original = self._model.source.tensor(name).to(device).float()
        errors = {
            (group, group_size, bits): self._read(group.layer, name, group_size, bits).to(device)
            - original
            for group_size in self._group_sizes
            for bits in self._widths
        }

        def see(x: torch.Tensor, output: torch.Tensor) -> None:
            inputs = x.detach()

            def add(gradient: torch.Tensor) -> None:
                for option, error in errors.items():
                    increase = ((inputs @ error.T) * gradient).sum(-1)
                    so_far = self._squares.get(option, 0.0)
                    self._squares[option] = so_far + float(increase.square().sum())

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return see

    def _of(self, index: int) -> list[LinearGroup]:
        return [group for group in self.groups if group.layer == index]

    def _read(self, index: int, name: str, group_size: int, bits: int) -> torch.Tensor:
        names = LinearWeight.names(f"{group_size}.{bits}.{name}")
        parts = (self._files.tensor(self._file(index), part) for part in names)
        return LinearWeight(*parts).dequantize(bits)

    def _file(self, index: int) -> Path:
        return self._folder / f"linear-{index:05}.safetensors"
