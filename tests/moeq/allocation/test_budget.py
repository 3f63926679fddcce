"""Budgets in bytes against tensors that were really packed."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moeq.allocation import PlanOptions, make_plan
from moeq.allocation.budget import (
    bits_budget,
    bits_per_weight_budget,
    option_sizes,
    parse_size,
    target_size_budget,
)
from moeq.checkpoint.reader import CheckpointReader
from moeq.errors import MoeqError
from moeq.rounding import quantize_rtn
from support.checkpoints import HIDDEN, INTERMEDIATE, NUM_EXPERTS, NUM_LAYERS, write_checkpoint
from vllm_moeq.format import FormatError

GROUP = 32
WEIGHTS = NUM_LAYERS * NUM_EXPERTS * 3 * HIDDEN * INTERMEDIATE


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CheckpointReader:
    return CheckpointReader(write_checkpoint(tmp_path_factory.mktemp("model")))


def _packed(bits: int, group_size: int = GROUP) -> tuple[int, int]:
    """Pack the weights of one expert; return the bytes of gate and up, and of down."""

    def size(rows: int, columns: int) -> int:
        weight = quantize_rtn(torch.randn(rows, columns), bits, group_size)
        return sum(tensor.nbytes for tensor in weight)

    return 2 * size(INTERMEDIATE, HIDDEN), size(HIDDEN, INTERMEDIATE)


def _experts(bits: int, group_size: int = GROUP) -> int:
    return NUM_LAYERS * NUM_EXPERTS * sum(_packed(bits, group_size))


@pytest.mark.parametrize("group_size", [32, 64])
def test_sizes_are_those_of_packed_tensors(reader: CheckpointReader, group_size: int) -> None:
    widths = (8, 4, 3, 2, 1)
    sizes = option_sizes(reader.moe_layers(), group_size, widths)
    assert (sizes.dtype, sizes.shape) == (np.int64, (NUM_LAYERS * NUM_EXPERTS * 2, 5))
    for column, width in enumerate(widths):
        assert sizes[:, column].tolist() == [*_packed(width, group_size)] * 8


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bits_mean_the_bytes_of_a_uniform_plan(reader: CheckpointReader, bits: int) -> None:
    assert bits_budget(bits, reader.moe_layers(), GROUP) == _experts(bits)


@pytest.mark.parametrize("bits", [1.5, 2.25, 2.5, 5.0])
def test_bits_mean_the_bytes_of_a_mixed_plan_of_that_average(
    reader: CheckpointReader, bits: float
) -> None:
    layers = reader.moe_layers()
    options = PlanOptions(bits, strategy="random:0", group_size=GROUP)
    provenance = make_plan(reader, layers, options, "source").provenance
    assert provenance.achieved_bits == bits
    assert bits_budget(bits, layers, GROUP) == provenance.expert_bytes


def test_an_average_that_float64_does_not_hold_loses_no_byte(reader: CheckpointReader) -> None:
    # 0.6 of the code bytes of 1 bit are whole, but 2.6 is not what float64 holds.
    layers = [layer for layer in reader.moe_layers() for _ in range(5)]
    exact = 5 * (_experts(2) * 2 + _experts(3) * 3) // 5
    assert bits_budget(2.6, layers, GROUP) == exact
    assert bits_budget(8 / 3, layers[::5] * 3, GROUP) == _experts(2) + 2 * _experts(3)


@pytest.mark.parametrize("bits", [1.75, 2.5, 3.0, 9.0])
def test_bits_per_weight_count_scales(reader: CheckpointReader, bits: float) -> None:
    budget = bits_per_weight_budget(bits, reader.moe_layers(), GROUP)
    assert budget == WEIGHTS * bits / 8


def test_target_size_counts_all_tensors(reader: CheckpointReader) -> None:
    layers = reader.moe_layers()
    routers, embedding = NUM_LAYERS * NUM_EXPERTS * HIDDEN * 2, 32 * HIDDEN * 2
    other = routers + embedding
    assert target_size_budget("200kB", reader, layers, GROUP) == 200_000 - other
    least = _experts(1) + other
    assert target_size_budget(f"{least}B", reader, layers, GROUP) == _experts(1)
    for target in (f"{least - 1}B", "1B"):
        with pytest.raises(MoeqError) as error:
            target_size_budget(target, reader, layers, GROUP)
        message = str(error.value)
        assert message.startswith(f"--target-size {target} ")
        assert f"at least {least:,} bytes" in message
        assert f"{other:,} " in message and f"{_experts(1):,} " in message


def test_the_smallest_budget_follows_the_widths(reader: CheckpointReader) -> None:
    layers = reader.moe_layers()
    with pytest.raises(MoeqError, match=f"at least {_experts(3):,} bytes .3 bits"):
        bits_per_weight_budget(3.0, layers, GROUP, widths=(4, 3))
    with pytest.raises(MoeqError, match=r"--bits 2.5 is not between 3 and 4"):
        bits_budget(2.5, layers, GROUP, widths=(4, 3))


@pytest.mark.parametrize("bits", [0.9, 8.1, -1.0, 0.0, math.nan, math.inf])
def test_bits_out_of_range_are_refused(reader: CheckpointReader, bits: float) -> None:
    with pytest.raises(MoeqError, match=re.escape(f"--bits {bits:g} is not between 1 and 8")):
        bits_budget(bits, reader.moe_layers(), GROUP)


@pytest.mark.parametrize("bits", [1.7, -1.0, 0.0, math.nan, math.inf])
def test_bits_per_weight_out_of_range_are_refused(reader: CheckpointReader, bits: float) -> None:
    # 1 bit and 24 for each group of 32 are 1.75.
    with pytest.raises(MoeqError, match=re.escape(f"--bits-per-weight {bits:g} ")):
        bits_per_weight_budget(bits, reader.moe_layers(), GROUP)


def test_a_group_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    layers = CheckpointReader(write_checkpoint(tmp_path)).moe_layers()
    with pytest.raises(FormatError, match="group size 128"):
        option_sizes(layers, 128, (2,))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("14GB", 14 * 10**9),
        ("14 GiB", 14 * 2**30),
        ("0.1GB", 10**8),
        ("1.5TiB", 3 * 2**39),
        ("2.3MB", 2_300_000),
        ("3MiB", 3 * 2**20),
        ("5kB", 5000),
        ("5KiB", 5120),
        ("7B", 7),
        ("12gb", 12 * 10**9),
        ("1.9B", 1),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "14", "GB", "-1GB", "1e9B", "14G", "nanGB", "1,5GB"])
def test_sizes_without_a_meaning_are_refused(text: str) -> None:
    with pytest.raises(MoeqError, match=f"--target-size {text}.* 14GB or 13.5GiB"):
        parse_size(text)
