"""Rounds dense layers by what they get."""

from collections.abc import Callable, Iterable, Iterator

import torch

from moeq.checkpoint.linear import LinearGroup
from moeq.errors import MoeqError
from moeq.model.layerwise import LayerwiseModel
from moeq.model.watch import Watch
from moeq.rounding import (
    DATA_FREE,
    Hessian,
    LinearWeight,
    gram,
    round_linear,
    round_linear_by_inputs,
)


class LinearInputs:
    """Sums of the outer products of what groups of dense layers get.

    Attributes:
        watch: Sees the inputs, see :meth:`LayerwiseModel.watch`.

    Args:
        model: Runs the layers.
        groups: Of one decoder layer.
    """

    def __init__(self, model: LayerwiseModel, groups: Iterable[LinearGroup]) -> None:
        self._model = model
        self._sums: dict[LinearGroup, torch.Tensor] = {}
        self._tokens: dict[LinearGroup, int] = {}
        self.watch: Watch = {
            group.weights[0]: self._add(group) for group in groups if not group.looks_up
        }

    def _add(self, group: LinearGroup) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def add(x: torch.Tensor, _: torch.Tensor) -> None:
            tokens = x.detach().flatten(0, -2)
            self._tokens[group] = self._tokens.get(group, 0) + len(tokens)
            products = gram(tokens)
            self._sums[group] = self._sums[group] + products if group in self._sums else products

        return add

    def rounded(
        self,
        group: LinearGroup,
        widths: Iterable[int],
        group_sizes: Iterable[int],
        method: str = "gptq",
    ) -> Iterator[tuple[str, int, int, LinearWeight]]:
        """Round the weights of a group; what is known of its inputs is used up.

        Weights that the source stores with a width and a group size are not rounded.

        Args:
            group: Which.
            widths: At each of which.
            group_sizes: With each of which.
            method: Of :data:`moeq.rounding.METHODS`; without calibration, to nearest. So are rows
                that tokens choose: they get nothing whose errors could make up for each other.

        Yields:
            Name of a weight, width, group size, and the weight with these.

        Raises:
            MoeqError: Weights or inputs are not finite, or nothing came to the group; names it.
        """
        source, hessian = self._model.source, None
        by_inputs = method not in DATA_FREE and not group.looks_up
        if by_inputs and group not in self._sums:
            raise MoeqError(
                f"{source.folder}: {group.weights[0]} is no linear layer of the model in "
                "transformers; give `dense_bits` 16"
            )
        try:
            if by_inputs:
                hessian = Hessian.of(self._sums.pop(group)[None], [self._tokens[group]])
            for name in group.weights:
                weight = source.tensor(name).to(self._model.device)
                for group_size in group_sizes:
                    for bits in widths:
                        if group.copies(bits, group_size):
                            rounded = source.integers(name, group_size).to(self._model.device)
                        elif hessian is None:
                            rounded = round_linear(weight, bits, group_size)
                        else:
                            rounded = round_linear_by_inputs(weight, hessian, bits, group_size)
                        yield name, bits, group_size, rounded
        except ValueError as error:
            names = ", ".join(group.weights)
            raise MoeqError(f"{source.folder}: cannot quantize {names}: {error}") from error
