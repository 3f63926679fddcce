"""Learned rounding: signed gradient descent on codes and scales against an MoE block's output.

After Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent" (SignRound, AutoRound;
2023): a weight's code may move to a neighbour, a group's range may shrink or grow, and both follow
the sign of the gradient. The start is any rounding, here GPTQ or round to nearest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moeq.model.layerwise import ExpertMatrices, Routed
from moeq.rounding import QuantizedWeight
from vllm_moeq.format import unpack, zero_point_unit

_BATCH = 1024
_NEAREST_EDGE = 0.49
"""How far from its code, in codes, a weight may start: below 0.5, where it would be another."""

ExpertHidden = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes gate, up and x [n, K]; returns what the down projection gets."""


class LearnedMatrix:
    """A rounded matrix whose codes and scales are learned; zero points stay.

    Args:
        weight: The original, float32 [N, K].
        rounded: Where learning starts.
        bits: Its width.
    """

    def __init__(self, weight: torch.Tensor, rounded: QuantizedWeight, bits: int) -> None:
        self._bits = bits
        self._zero = (rounded.zero_point.float() * zero_point_unit(bits))[..., None]
        self._scale = rounded.scale.float()[..., None]
        codes = unpack(rounded.packed, bits).float().view(*rounded.scale.shape, -1)
        exact = weight.view_as(codes) / self._scale + self._zero
        # A weight that lies between two codes changes its code first.
        start = codes + (exact - codes).clamp(-_NEAREST_EDGE, _NEAREST_EDGE)
        self.position = start.requires_grad_()
        self.range = torch.ones_like(self._scale).requires_grad_()

    def weight(self) -> torch.Tensor:
        """Return the weights [N, K]; gradients pass the rounding of codes as they are."""
        codes = self.position + (self._codes() - self.position).detach()
        return ((codes - self._zero) * (self._scale * self.range)).flatten(1)

    def stored(self) -> QuantizedWeight:
        """Return what the format stores."""
        scale, zero = self._scale * self.range.detach(), self._zero
        return QuantizedWeight.of(
            self._codes().flatten(1), scale.squeeze(-1), zero.squeeze(-1), self._bits
        )

    def _codes(self) -> torch.Tensor:
        return self.position.detach().round().clamp(0, (1 << self._bits) - 1)


@dataclass(frozen=True, slots=True)
class LearnedExpert:
    """The three matrices of an expert."""

    gate: LearnedMatrix
    up: LearnedMatrix
    down: LearnedMatrix

    @classmethod
    def of(
        cls,
        original: ExpertMatrices,
        rounded: tuple[QuantizedWeight, ...],
        bits: tuple[int, int],
    ) -> "LearnedExpert":
        """Start from rounded gate, up and down; ``bits`` are the widths of gate and up, of down."""
        widths = (bits[0], *bits)
        return cls(*map(LearnedMatrix, original, rounded, widths))

    def stored(self) -> tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]:
        """Return gate, up and down as the format stores them."""
        return self.gate.stored(), self.up.stored(), self.down.stored()


def learn_rounding(
    experts: list[LearnedExpert],
    expert_hidden: ExpertHidden,
    routed: Routed,
    wanted: torch.Tensor,
    steps: int,
    seed: int = 0,
) -> None:
    """Move codes and scales of a block's experts to where its output is nearest to a wanted one.

    The learning rate falls from 1 / steps to 0, so that a weight moves by half a code at most.

    Args:
        experts: All experts of the block; changed in place.
        expert_hidden: The expert's first half.
        routed: What they get.
        wanted: Output of the block, float32 [T, hidden_size].
        steps: Of 1024 tokens each.
        seed: Of the draw of tokens.
    """
    matrices = [m for expert in experts for m in (expert.gate, expert.up, expert.down)]
    parameters = [p for matrix in matrices for p in (matrix.position, matrix.range)]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        pick = torch.randint(len(routed.x), (min(_BATCH, len(routed.x)),), generator=generator)
        part = Routed(*(tensor[pick].clone() for tensor in routed))
        output = torch.zeros_like(part.x)
        for number, expert in enumerate(experts):
            places, weights = part.of_expert(number)
            inner = expert_hidden(expert.gate.weight(), expert.up.weight(), part.x[places])
            output = output.index_add(0, places, inner @ expert.down.weight().T * weights)
        loss = (output - wanted[pick]).square().sum()
        gradients = torch.autograd.grad(loss, parameters)
        rate = (1 - step / steps) / steps
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient.sign()
