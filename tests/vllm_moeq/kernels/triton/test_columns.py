"""GPTQ's loops over columns, interpreted: judged in float64, and against those in torch."""

from concurrent.futures import Executor

import pytest
import torch

from moeq.rounding import columns
from support.interpreter import descend, round_columns, triton_block
from support.rounding import Block

SHAPES = [(1, 1), (40, 3), (128, 33)]
"""Columns and rows: of less than one program and of two."""


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("size", "rows"), SHAPES)
def test_rounding(size: int, rows: int, bits: int, interpreter: Executor) -> None:
    block = Block.drawn(size, rows, bits)
    codes, difference = interpreter.submit(round_columns, *block, bits).result()
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
    ours, slope = interpreter.submit(
        descend, hessian, block.scale, codes.clone(), gradient.clone(), bits
    ).result()
    columns.descend_torch(hessian, block.scale, theirs := codes.clone(), gradient.clone(), bits)
    assert (ours != theirs).any(1).float().mean() < 0.02
    errors = [
        block.error((chosen - block.zero) * block.scale - block.wanted)
        for chosen in (codes, ours, theirs)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() <= (1 + 1e-3) * errors[2].sum()
    change = (ours - codes) * block.scale
    torch.testing.assert_close(slope, gradient + hessian @ change, rtol=1e-4, atol=1e-4)


def test_a_program_holds_as_many_columns_as_a_block_has(interpreter: Executor) -> None:
    assert interpreter.submit(triton_block).result() == columns.BLOCK
    block = Block.drawn(columns.BLOCK + 1, 2, 2)
    with pytest.raises(ValueError, match="129 columns do not fit"):
        interpreter.submit(round_columns, *block, 2).result()
