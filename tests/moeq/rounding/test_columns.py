"""The compiled column loops against those in torch, and these against float64."""

from collections.abc import Callable

import pytest
import torch

from moeq.rounding.columns import (
    descend,
    round_columns,
    round_columns_torch,
)
from moeq.rounding.grid import largest_code
from support.rounding import Block
from vllm_moeq.kernels import cpu

COMPILED = cpu.unavailable(torch.device("cpu")) is None
needs_compiler = pytest.mark.skipif(not COMPILED, reason="needs a C++ compiler")
WIDTHS = [1, 2, 3, 4, 8]
SHAPES = [(1, 1), (8, 3), (100, 65), (300, 130)]  # columns, rows


@needs_compiler
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_compiled_rounding_is_that_of_torch(columns: int, rows: int, bits: int) -> None:
    block = Block.drawn(columns, rows, bits)
    block.check_rounding(*round_columns(*block, bits), bits)


@pytest.mark.parametrize("rounding", [round_columns, round_columns_torch])
def test_each_column_is_the_best_after_those_before(
    rounding: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Brute force over all codes of a column, for what it adds to its own component of d R."""
    bits = 2
    block = Block.drawn(40, 7, bits)
    codes, difference = rounding(*block, bits)
    factor, wanted, sums, scale, zero = (part.double() for part in block)
    for column in range(40):
        before = factor[:, :column, column, None] * difference[:, :column].double()
        fixed = sums[:, column] + before.sum(1)
        own = factor[:, column, column, None]
        found = torch.stack(
            [
                fixed + own * ((code - zero[:, column]) * scale[:, column] - wanted[:, column])
                for code in range(largest_code(bits) + 1)
            ]
        ).square()
        chosen = found.gather(0, codes[None, :, column].long())[0]
        assert (chosen <= found.amin(0) * (1 + 1e-4) + 1e-9).all()


@needs_compiler
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_compiled_descent_is_that_of_torch(columns: int, rows: int, bits: int) -> None:
    def compiled(
        hessian: torch.Tensor,
        scale: torch.Tensor,
        codes: torch.Tensor,
        gradient: torch.Tensor,
        bits: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        descend(hessian, scale, codes, gradient, bits)
        return codes, gradient

    Block.drawn(columns, rows, bits).check_descent(compiled, bits)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_threads_or_on_each_other(threads: int) -> None:
    bits = 3
    block = Block.drawn(70, 201, bits)
    hessian, before = block.factor @ block.factor.mT, torch.get_num_threads()

    def both(part: slice) -> list[torch.Tensor]:
        cut = block._replace(
            **{name: getattr(block, name)[..., part] for name in block._fields if name != "factor"}
        )
        codes, difference = round_columns(*cut, bits)
        gradient = (difference * 0.3).contiguous()
        chosen = codes.clone()
        descend(hessian, cut.scale, chosen, gradient, bits)
        return [codes, difference, chosen, gradient]

    whole = both(slice(None))
    try:
        torch.set_num_threads(threads)
        pieces = [both(part) for part in (slice(0, 1), slice(1, 90), slice(90, 201))]
    finally:
        torch.set_num_threads(before)
    for together, *apart in zip(whole, *pieces, strict=True):
        assert torch.equal(together, torch.cat(apart, -1))
