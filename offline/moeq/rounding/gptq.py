"""GPTQ: codes that keep the OUTPUT of a matrix, given what its inputs look like.

Minimizes tr(D H D^T) with D = quantized - original weights and H = X^T X of the inputs X:
Frantar et al., "GPTQ" (ICLR 2023), columns in the order of their input energy, on grids that are
fixed beforehand, so that no index is needed when the model runs. It is done with a factor of H
itself, as Babai's nearest plane, which gives the same codes without an inverse (Chen et al., "The
geometry of LLM quantization", 2025). After each block of columns, and again in rounds of
refinement, coordinate descent lowers the same objective: it sets each code to what is best while
all others stay (Behdin et al., "QuantEase", 2023), in the rounds also each group's scale and zero
point.

Matrices of several experts are rounded at once. Inside this file they are transposed, [B, K, N]:
all work goes column by column, and a column should be contiguous.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moeq.rounding.columns import BLOCK, descend, round_columns
from moeq.rounding.grid import QuantizedWeight
from moeq.rounding.groups import refine_block, search_grids
from vllm_moeq.format import num_groups, spread

DAMPING, DAMPING_PER_COLUMN = 0.01, 0.5
"""Added to the diagonal of H, relative to its mean: at least the first, and more the fewer samples
there are for its columns. What a few samples say about K directions is mostly chance, and would be
fitted at the cost of all other inputs."""
_MOST_DAMPING = 1e3
_FEWEST_COLUMNS, _MOST_BLOCKS = 1024, 8
"""Of the blocks in which codes are improved by coordinate descent: larger ones find better codes,
but their columns are multiplied with each other."""


class Refinement(NamedTuple):
    """How much is done beyond GPTQ itself.

    Attributes:
        rounds: Over all columns after GPTQ, at most.
        sweeps: Over a block of columns in each round.
        scales: Whether each sweep fits scales and zero points, too.
        in_feedback: Sweeps over the codes of a block within GPTQ.
    """

    rounds: int = 1
    sweeps: int = 4
    scales: bool = True
    in_feedback: int = 1

    @property
    def visits(self) -> int:
        """How often a column is visited, with GPTQ itself."""
        return 1 + self.in_feedback + self.rounds * self.sweeps


REFINEMENT = Refinement()


class Hessian(NamedTuple):
    """What a batch of matrices is rounded by: damped Hessians and their factors.

    Attributes:
        damped: float32 [B, K, K].
        order: int64 [B, K]: columns by their input energy, most first.
        factor: float32 [B, K, K]: upper R of R R^T = H, columns in that order.
        damping: float32 [B]: what was added to the diagonals.
    """

    damped: torch.Tensor
    order: torch.Tensor
    factor: torch.Tensor
    damping: torch.Tensor

    @classmethod
    def of(cls, sums: torch.Tensor, samples: Sequence[int]) -> "Hessian":
        """Damp Hessians, in place, and factor them; those that need more damping get more.

        Args:
            sums: Of the outer products of inputs, float32 [B, K, K].
            samples: How many inputs each of them comes from.

        Raises:
            ValueError: A Hessian is not finite.
        """
        if not torch.isfinite(sums).all():
            raise ValueError("the calibration activations are NaN or infinite")
        undamped = sums.diagonal(dim1=1, dim2=2).clone()
        mean = undamped.mean(1)
        for b in (mean <= 0).nonzero().flatten().tolist():  # no input: all columns count the same
            sums[b].zero_()
            mean[b] = 1
        order = undamped.argsort(descending=True, stable=True)
        columns, factor = sums.shape[1], torch.empty_like(sums)
        shares = [max(DAMPING, DAMPING_PER_COLUMN * columns / max(1, count)) for count in samples]
        damping, left = mean.new_tensor(shares) * mean, list(range(len(sums)))
        while True:
            failed = []
            for b in left:
                torch.add(undamped[b], damping[b], out=sums[b].diagonal())
                failed.append(_factor(sums[b], order[b], factor[b]))
            # One question to the device for all of an attempt.
            left = [b for b, fails in zip(left, torch.stack(failed).tolist(), strict=True) if fails]
            if not left:
                break
            damping[left] *= 10
            if (damping[left] > _MOST_DAMPING * mean[left]).any():
                raise ValueError(f"the Hessian is singular even with {_MOST_DAMPING:g} x damping")
        return cls(sums, order, factor, damping)


_MOST_COLUMNS = 1024
"""Of a Gram matrix that are computed at once."""


def gram_block(columns: int) -> int:
    """Return how many columns of a Gram matrix of so many are computed at once."""
    return max(128, min(_MOST_COLUMNS, columns // 8))


def gram(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of the outer products of inputs [n, K] with themselves: [K, K].

    Symmetric, so that little more than a half is computed.
    """
    columns = x.shape[1]
    block = gram_block(columns) if x.device.type == "cpu" else _MOST_COLUMNS
    result = x.new_empty(columns, columns)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        result[first:last, first:] = x[:, first:last].T @ x[:, first:]
        result[last:, first:last] = result[first:last, last:].T
    return result


def _factor(damped: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the factor of one Hessian to ``out``; return whether that has failed."""
    reverse = order.flip(0)  # a lower factor is an upper one with everything in reverse
    failed: torch.Tensor
    lower, failed = torch.linalg.cholesky_ex(damped[reverse[:, None], reverse])
    out.copy_(lower.flip(0, 1))
    return failed


def quantize_gptq(
    weights: torch.Tensor,
    hessian: Hessian,
    bits: int,
    group_size: int,
    refinement: Refinement = REFINEMENT,
) -> list[QuantizedWeight]:
    """Quantize matrices so that their outputs on the calibration inputs change least.

    Args:
        weights: [B, N, K], any floating type; K is a multiple of 8.
        hessian: Of their inputs.
        bits: Width, one of the format's.
        group_size: Weights of a row that share a grid; the last group may be shorter.
        refinement: What to do beyond GPTQ itself.

    Raises:
        ValueError: The weights are not finite, or too large for float16 scales.
    """
    weights = weights.float()
    importance = hessian.damped.diagonal(dim1=1, dim2=2)
    scale, zero = search_grids(weights, importance, bits, group_size)
    transposed = weights.transpose(1, 2).contiguous()
    codes = feed_back(transposed, hessian, scale, zero, bits, group_size, refinement.in_feedback)
    if refinement.rounds:
        refine(transposed, hessian.damped, codes, scale, zero, bits, group_size, refinement)
    return [QuantizedWeight.of(codes[i].T, scale[i].T, zero[i].T, bits) for i in range(len(codes))]


def block_size(columns: int) -> int:
    """Return how many columns of so many are improved together, at most."""
    return max(_FEWEST_COLUMNS, -(-columns // (_MOST_BLOCKS * BLOCK)) * BLOCK)


def _blocks(columns: int) -> list[slice]:
    size = block_size(columns)
    return [slice(first, min(first + size, columns)) for first in range(0, columns, size)]


def feed_back(
    weight: torch.Tensor,
    hessian: Hessian,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group_size: int,
    sweeps: int,
) -> torch.Tensor:
    """Choose codes column by column; what is not chosen yet makes up for the error so far.

    Returns:
        Codes as float32 [B, K, N].
    """
    order, factor = hessian.order, hessian.factor
    columns, rows = weight.shape[1:]
    group = order // group_size
    sums = torch.zeros_like(weight)  # of the differences times the factor
    codes = torch.empty_like(weight)
    for block in _blocks(columns):
        places = order[:, block, None].expand(-1, -1, rows)
        grids = group[:, block, None].expand(-1, -1, rows)
        wanted, step, origin = (
            weight.gather(1, places),
            scale.gather(1, grids),
            zero.gather(1, grids),
        )
        chosen, local, within = torch.empty_like(wanted), factor[:, block, block], sums[:, block]
        for first in range(0, wanted.shape[1], BLOCK):
            part = slice(first, min(first + BLOCK, wanted.shape[1]))
            chosen[:, part], difference = round_columns(
                local[:, part, part],
                wanted[:, part],
                within[:, part],
                step[:, part],
                origin[:, part],
                bits,
            )
            within[:, first:].baddbmm_(local[:, part, first:].mT, difference)
        if sweeps:  # what follows will make up for errors, so that only these columns of d R count
            curved, gradient = local @ local.mT, local @ within
            for _ in range(sweeps):
                descend(curved, step, chosen, gradient, bits)
        codes.scatter_(1, places, chosen)
        difference = chosen.sub_(origin).mul_(step).sub_(wanted)
        sums[:, block.stop :].baddbmm_(factor[:, block, block.stop :].mT, difference)
    return codes


def refine(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group_size: int,
    refinement: Refinement,
) -> None:
    """Improve grids and codes in place, block by block."""
    difference = _dequantize(codes, scale, zero, group_size).sub_(weight)
    for _ in range(refinement.rounds):
        for block in _blocks(weight.shape[1]):
            groups = slice(block.start // group_size, num_groups(block.stop, group_size))
            chosen, steps, origins = codes[:, block], scale[:, groups], zero[:, groups]
            local, gradient = hessian[:, block, block], hessian[:, block] @ difference
            if refinement.scales:
                refine_block(
                    local, gradient, chosen, steps, origins, bits, group_size, refinement.sweeps
                )
            else:
                step = spread(steps, group_size, chosen.shape[1])
                for _ in range(refinement.sweeps):
                    descend(local, step, chosen, gradient, bits)
            rounded = _dequantize(chosen, steps, origins, group_size)
            difference[:, block] = rounded.sub_(weight[:, block])


def _dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_size: int
) -> torch.Tensor:
    columns = codes.shape[1]
    return (codes - spread(zero, group_size, columns)).mul_(spread(scale, group_size, columns))
