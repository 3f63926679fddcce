"""``quantization_config`` and the tensors that a plan promises."""

import pytest
import torch

from vllm_moeq.format import (
    WIDTHS,
    BitPlan,
    CheckpointConfig,
    ExpertTensor,
    FormatError,
    LayerBits,
    packed_bytes,
    packed_tensors,
)

PLAN = BitPlan(128, {"layers.0.mlp.experts": LayerBits((3, 2), (2, 1))})


def test_config_survives_its_json_form() -> None:
    data = CheckpointConfig(PLAN).to_dict()
    assert data["quant_method"] == "moeq"
    assert data["format_version"] == 1
    assert CheckpointConfig.from_dict(data).plan == PLAN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": None}, "quant_method is None"),
        ({"linear": {"bits": 4}}, "quantization_config.linear"),
        ({"format_version": 99}, "format_version 99"),
    ],
)
def test_what_this_version_cannot_read_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        CheckpointConfig.from_dict(CheckpointConfig(PLAN).to_dict() | changes)


@pytest.mark.parametrize("data", [None, "moeq", []])
def test_config_must_be_an_object(data: object) -> None:
    with pytest.raises(FormatError, match="JSON object"):
        CheckpointConfig.from_dict(data)


def test_promised_tensors_are_those_of_the_format() -> None:
    assert list(packed_tensors(6, 256, 3, 64)) == [
        ExpertTensor("weight_packed", torch.uint8, (6, 96)),
        ExpertTensor("weight_scale", torch.float16, (6, 4)),
        ExpertTensor("weight_zero_point", torch.uint8, (6, 4)),
    ]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bytes_are_codes_and_three_for_each_group(bits: int, group_size: int) -> None:
    assert packed_bytes(10, 256, bits, group_size) == 10 * (32 * bits + 3 * 256 // group_size)


@pytest.mark.parametrize(("group_size", "groups"), [(32, 6), (64, 3), (128, 2)])
def test_a_short_last_group_takes_the_bytes_of_its_codes(group_size: int, groups: int) -> None:
    assert packed_bytes(10, 176, 3, group_size) == 10 * (66 + 3 * groups)


def test_a_row_that_is_no_multiple_of_eight_is_named() -> None:
    with pytest.raises(FormatError, match="a row of 100 weights is not a multiple of 8"):
        packed_bytes(2, 100, 4, 64)
