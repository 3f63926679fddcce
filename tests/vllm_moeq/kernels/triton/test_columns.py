"""GPTQ's loops over columns, interpreted: judged in float64, and against those in torch."""

from concurrent.futures import Executor
from functools import partial

import pytest
import torch

from moeq.rounding import columns
from support.interpreter import columns_loop
from support.rounding import Block

SHAPES = [(1, 1), (40, 3), (128, 33)]
"""Columns and rows: of less than one program and of two."""


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("size", "rows"), SHAPES)
def test_rounding(size: int, rows: int, bits: int, interpreter: Executor) -> None:
    block = Block.drawn(size, rows, bits)
    codes, difference = interpreter.submit(
        columns_loop, "round_columns", *block, 2**bits - 1
    ).result()
    same, expected = columns.round_columns_torch(*block, bits)
    # A sum that is rounded differently may fall on the other side of a tie.
    assert (codes != same).any(1).float().mean() < 0.02
    torch.testing.assert_close(difference, (codes - block.zero) * block.scale - block.wanted)
    assert block.error(difference).sum() <= (1 + 1e-3) * block.error(expected).sum()


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("size", "rows"), [*SHAPES[:2], (140, 33)])
def test_descent(size: int, rows: int, bits: int, interpreter: Executor) -> None:
    """Over more columns than a program holds, too."""
    block = Block.drawn(size, rows, bits)
    hessian = block.factor @ block.factor.mT
    codes, difference = columns.round_columns_torch(*block, bits)
    gradient = block.factor @ (block.sums + block.factor.mT @ difference)

    def interpreted(*parts: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        return interpreter.submit(columns_loop, "descend", *parts).result()

    results = []
    for descent in (partial(columns.in_blocks, interpreted), columns.descend_torch):
        chosen, slope = codes.clone(), gradient.clone()
        descent(hessian, block.scale, chosen, slope, bits)
        results.append((chosen, slope))
    (ours, slope), (theirs, _) = results
    assert (ours != theirs).any(1).float().mean() < 0.02
    errors = [
        block.error((chosen - block.zero) * block.scale - block.wanted)
        for chosen in (codes, ours, theirs)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() <= (1 + 1e-3) * errors[2].sum()
    change = (ours - codes) * block.scale
    torch.testing.assert_close(slope, gradient + hessian @ change, rtol=1e-4, atol=1e-4)
