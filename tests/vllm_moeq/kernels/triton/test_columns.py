"""GPTQ's loops over columns, interpreted: judged in float64, and against those in torch."""

from concurrent.futures import Executor

import pytest

from moeq.rounding import columns
from support.interpreter import descend, round_columns, triton_block
from support.rounding import Block

SHAPES = [(1, 1), (40, 3), (128, 33)]
"""Columns and rows: of less than one program and of two."""


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("size", "rows"), SHAPES)
def test_rounding(size: int, rows: int, bits: int, interpreter: Executor) -> None:
    block = Block.drawn(size, rows, bits)
    block.check_rounding(*interpreter.submit(round_columns, *block, bits).result(), bits)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("size", "rows"), [*SHAPES[:2], (140, 33)])
def test_descent(size: int, rows: int, bits: int, interpreter: Executor) -> None:
    """Over more columns than a program holds, too."""
    Block.drawn(size, rows, bits).check_descent(
        lambda *parts: interpreter.submit(descend, *parts).result(), bits
    )


def test_a_program_holds_as_many_columns_as_a_block_has(interpreter: Executor) -> None:
    assert interpreter.submit(triton_block).result() == columns.BLOCK
    block = Block.drawn(columns.BLOCK + 1, 2, 2)
    with pytest.raises(ValueError, match="129 columns do not fit"):
        interpreter.submit(round_columns, *block, 2).result()
