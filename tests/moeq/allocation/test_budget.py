"""Budgets in bytes against tensors that were really packed."""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moeq import plan, quantize
from moeq.allocation import PlanOptions, expert_counts, make_plan
from moeq.allocation.budget import bits_budget, bits_by_layer, file_budget, file_bytes
from moeq.checkpoint import SourceModel
from moeq.checkpoint.linear import LinearGroup, linear_groups
from moeq.checkpoint.sizes import option_sizes
from moeq.errors import MoeqError
from moeq.rounding import quantize_rtn
from support.checkpoints import (
    HIDDEN,
    INTERMEDIATE,
    NUM_EXPERTS,
    NUM_LAYERS,
    OTHER_WEIGHTS,
    write_checkpoint,
)

GROUP = 32
WEIGHTS = NUM_LAYERS * NUM_EXPERTS * 3 * HIDDEN * INTERMEDIATE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return SourceModel.open(write_checkpoint(tmp_path_factory.mktemp("model")))


def _packed(bits: int, group_size: int = GROUP) -> tuple[int, int]:
    """Pack the weights of one expert; return the bytes of gate and up, and of down."""

    def size(rows: int, columns: int) -> int:
        weight = quantize_rtn(torch.randn(rows, columns), bits, group_size)
        return sum(tensor.nbytes for tensor in weight)

    return 2 * size(INTERMEDIATE, HIDDEN), size(HIDDEN, INTERMEDIATE)


@functools.cache
def _expert(bits: int) -> int:
    return sum(_packed(bits))


def _experts(bits: int, group_size: int = GROUP) -> int:
    return NUM_LAYERS * NUM_EXPERTS * sum(_packed(bits, group_size))


@pytest.mark.parametrize("group_size", [32, 64])
def test_sizes_are_those_of_packed_tensors(source: SourceModel, group_size: int) -> None:
    widths = (8, 4, 3, 2, 1)
    sizes = option_sizes(source.layers, group_size, widths)
    assert sizes.dtype == np.int64 and sizes.shape == (NUM_LAYERS * NUM_EXPERTS * 2, 5)
    for column, width in enumerate(widths):
        assert sizes[:, column].tolist() == [*_packed(width, group_size)] * 8


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bits_mean_the_bytes_of_a_uniform_plan(source: SourceModel, bits: int) -> None:
    assert bits_budget(bits, source.layers, GROUP) == _experts(bits)


@pytest.mark.parametrize("bits", [1.5, 2.25, 2.5, 5.0])
def test_bits_mean_the_bytes_of_a_mixed_plan_of_that_average(
    source: SourceModel, bits: float
) -> None:
    layers = source.layers
    options = PlanOptions(bits, strategy="random:0", group_size=GROUP)
    provenance = make_plan(source, options).provenance
    assert provenance.achieved_bits == bits
    assert bits_budget(bits, layers, GROUP) == provenance.expert_bytes


def test_an_average_that_float64_does_not_hold_loses_no_byte(source: SourceModel) -> None:
    # 0.6 of the code bytes of 1 bit are whole, but 2.6 is not what float64 holds.
    layers = [layer for layer in source.layers for _ in range(5)]
    exact = 5 * (_experts(2) * 2 + _experts(3) * 3) // 5
    assert bits_budget(2.6, layers, GROUP) == exact
    assert bits_budget(8 / 3, layers[::5] * 3, GROUP) == _experts(2) + 2 * _experts(3)


@pytest.mark.parametrize("bits", [1.75, 2.5, 3.0, 9.0])
def test_bits_per_weight_are_those_of_the_whole_file(source: SourceModel, bits: float) -> None:
    routers = NUM_LAYERS * NUM_EXPERTS * HIDDEN
    assert file_bytes(bits, source) == int((WEIGHTS + routers + OTHER_WEIGHTS) * bits / 8)


def test_target_size_counts_all_tensors(source: SourceModel) -> None:
    other = (NUM_LAYERS * NUM_EXPERTS * HIDDEN + OTHER_WEIGHTS) * 2
    assert file_budget(200_000, source, GROUP) == 200_000 - other
    least = _experts(1) + other
    assert file_budget(least, source, GROUP) == _experts(1)
    for target in (least - 1, 1):
        with pytest.raises(MoeqError) as error:
            file_budget(target, source, GROUP, asked="`target_size` 5")
        message = str(error.value)
        assert message.startswith(f"`target_size` 5 allows {target:,} bytes")
        assert f"at least {least:,} bytes" in message
        assert f"{other:,} " in message and f"{_experts(1):,} " in message


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_size_too_small_names_the_options_that_reach_it(
    embeddings: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def stored(dense_bits: int, quantize_embeddings: bool = False) -> int:
        folder = tmp_path / f"{dense_bits}"
        quantize(
            tiny_model("mixtral"), folder, calib=None, strategy="uniform", bits=1,
            dense_bits=dense_bits, quantize_embeddings=quantize_embeddings,
        )  # fmt: skip
        return sum(t.nbytes for f in folder.glob("*.safetensors") for t in load_file(f).values())

    least = stored(4, quantize_embeddings=embeddings)
    with pytest.raises(MoeqError, match=f"at least {stored(16):,} bytes") as error:
        plan(tiny_model("mixtral"), calib=None, target_size=least)
    options = " and `quantize_embeddings`" if embeddings else ""
    assert str(error.value).endswith(f". With `dense_bits` 4{options} it takes {least:,}")


def test_remedies_are_sought_only_for_an_error_that_is_shown(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense layers of 8 bits do not fit, those of 4 do: nothing is wrong."""
    text = tmp_path / "text.txt"
    text.write_text("Bytes are tokens. " * 200)
    source = SourceModel.open(str(tiny_model("mixtral")))
    sought: list[object] = []

    def seek(*arguments: Any, **options: Any) -> list[LinearGroup]:
        sought.append(arguments)
        return linear_groups(*arguments, **options)

    monkeypatch.setattr("moeq.allocation.budget.linear_groups", seek)

    def dry_run(target_size: int) -> None:
        quantize(
            source.folder, tmp_path / "out", target_size=target_size, dry_run=True,
            strategy="sensitivity", calib=str(text), nsamples=8, seqlen=16, group_size=GROUP,
        )  # fmt: skip

    experts = int(option_sizes(source.layers, GROUP, (1,)).sum())
    others = {
        width: source.other_bytes
        + sum(group.num_bytes(width, GROUP) - group.full_bytes for group in source.linear)
        for width in (8, 4)
    }
    dry_run(others[8] + experts - 1)
    assert not sought
    with pytest.raises(MoeqError, match=r"`target_size` \d+ allows"):
        dry_run(others[4] + experts - 1)
    assert sought


def test_the_smallest_budget_follows_the_widths(source: SourceModel) -> None:
    layers = source.layers
    with pytest.raises(MoeqError, match=f"{_experts(3):,} for experts of 3 bits"):
        file_budget(_experts(3), source, GROUP, widths=(4, 3))
    with pytest.raises(MoeqError, match=r"`bits` 2.5 is not between 3 and 4"):
        bits_budget(2.5, layers, GROUP, widths=(4, 3))


@pytest.mark.parametrize("bits", [0.9, 8.1, -1.0, 0.0, math.nan, math.inf])
def test_bits_out_of_range_are_refused(source: SourceModel, bits: float) -> None:
    with pytest.raises(MoeqError, match=re.escape(f"`bits` {bits:g} is not between 1 and 8")):
        bits_budget(bits, source.layers, GROUP)


@pytest.mark.parametrize("bits", [-1.0, 0.0, math.nan, math.inf])
def test_bits_per_weight_out_of_range_are_refused(source: SourceModel, bits: float) -> None:
    with pytest.raises(MoeqError, match=re.escape(f"`bits_per_weight` {bits:g} ")):
        file_bytes(bits, source)


@pytest.mark.parametrize("levels", [(3, 2), (3, 2, 1), (8, 4), (4, 2)])
def test_layers_share_a_budget_to_the_last_expert(
    source: SourceModel, levels: tuple[int, ...]
) -> None:
    layers = [layer for layer in source.layers for _ in range(3)]
    least, most = (3 * _experts(level) for level in (levels[-1], levels[0]))
    step = (levels[0] - levels[1]) * 3 * HIDDEN * INTERMEDIATE // 8
    for budget in range(least, most + 1, 1009):
        counts = [
            expert_counts(bits, levels, NUM_EXPERTS)
            for bits in bits_by_layer(budget, layers, GROUP, levels)
        ]
        averages = [sum(bits * n for bits, n in of_layer.items()) for of_layer in counts]
        spent = sum(n * _expert(bits) for of_layer in counts for bits, n in of_layer.items())
        assert budget - step < spent <= budget
        assert max(averages) - min(averages) <= levels[0] - levels[1]


@pytest.mark.parametrize("levels", [(3, 2), (3,)])
def test_a_budget_beyond_the_levels_takes_the_highest(
    source: SourceModel, levels: tuple[int, ...]
) -> None:
    budget = _experts(3) + 100_000
    assert bits_by_layer(budget, source.layers, GROUP, levels) == [3.0] * NUM_LAYERS
