"""The memory layout: experts lie one after another without gaps, and the tensor form is exact."""

import pytest
import torch

from vllm_moeq.format import PROJECTIONS, FormatError
from vllm_moeq.kernels import ExpertLayout

W13, W2 = [8, 1, 3, 2, 4], [1, 2, 8, 4, 3]


def _layout(gated: bool = True) -> ExpertLayout:
    return ExpertLayout.build(
        w13_bits=W13, w2_bits=W2, group_size=32, hidden_size=64, intermediate_size=96, gated=gated
    )


@pytest.mark.parametrize(("gated", "w13_rows"), [(True, 192), (False, 96)])
def test_each_expert_takes_its_own_bytes_right_after_the_last_one(
    gated: bool, w13_rows: int
) -> None:
    layout = _layout(gated)
    sizes = ((W13, w13_rows, 64), (W2, 64, 96))
    for projection, (widths, rows, columns) in zip(PROJECTIONS, sizes, strict=True):
        assert layout.shape(projection) == (rows, columns)
        end = 0
        for slot, bits in enumerate(widths):
            size = rows * columns * bits // 8
            assert layout.bits_and_offset(projection, slot) == (bits, end)
            assert layout.span(projection, slot) == (end, size)
            end += size
        assert layout.buffer_bytes(projection) == end


def test_tensor_form_is_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        tensor = _layout().to_tensor()
    assert (tensor.device.type, tensor.dtype, tensor.shape) == ("cpu", torch.int64, (7, 4))


@pytest.mark.parametrize("gated", [True, False])
def test_tensor_form_is_read_back(gated: bool) -> None:
    layout = _layout(gated)
    assert ExpertLayout.from_tensor(layout.to_tensor()) == layout


def test_kernel_index_is_part_of_the_tensor_form() -> None:
    tensor = _layout().to_tensor()
    tensor[0, 0] = 3
    assert ExpertLayout.from_tensor(tensor).kernel == 3


def test_a_tensor_that_was_written_to_is_read_anew() -> None:
    tensor = _layout().to_tensor()
    before = ExpertLayout.from_tensor(tensor)
    tensor[2, 0] = 4  # width of the first expert's w13
    after = ExpertLayout.from_tensor(tensor)
    assert (before.slots[0].w13_bits, after.slots[0].w13_bits) == (8, 4)
    assert before.slots[1:] == after.slots[1:]


def test_copies_of_a_tensor_are_read_once() -> None:
    with torch.inference_mode():
        copies = [_layout().to_tensor() for _ in range(2)]
    assert ExpertLayout.from_tensor(copies[0]) is ExpertLayout.from_tensor(copies[1])


def test_widths_of_a_projection() -> None:
    layout = ExpertLayout.build(
        w13_bits=[2, 3, 2], w2_bits=[4, 4, 4], group_size=32, hidden_size=64, intermediate_size=96
    )
    assert layout.widths == {"w13": {2, 3}, "w2": {4}}


def test_an_unknown_width_is_named() -> None:
    with pytest.raises(FormatError, match="width 7"):
        ExpertLayout.build(
            w13_bits=[7], w2_bits=[2], group_size=32, hidden_size=64, intermediate_size=96
        )
