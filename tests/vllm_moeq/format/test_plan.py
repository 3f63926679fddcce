"""Bit plans: the JSON form, and that every malformed part is named."""

import json

import pytest

from vllm_moeq.format import BitPlan, FormatError, LayerBits, Provenance

LAYER = "model.layers.0.mlp.experts"


def _data(**changes: object) -> dict[str, object]:
    data: dict[str, object] = {
        "format_version": 1,
        "group_size": 64,
        "expert_bits": {LAYER: {"w13": [3, 2], "w2": [8, 1]}},
        "provenance": {"strategy": "maxvar", "requested_bits": 2.5, "details": {"zeta": 3.0}},
    }
    return data | changes


def test_json_form_is_read() -> None:
    plan = BitPlan.from_dict(_data())
    assert plan.group_size == 64
    assert plan.expert_bits == {LAYER: LayerBits(w13=(3, 2), w2=(8, 1))}
    assert plan.provenance == Provenance(
        strategy="maxvar", requested_bits=2.5, details={"zeta": 3.0}
    )


def test_plans_survive_json() -> None:
    plan = BitPlan.from_dict(_data())
    assert BitPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_provenance_of_a_later_version_is_read() -> None:
    data = _data(provenance={"strategy": "x", "colour": "green"})
    assert BitPlan.from_dict(data).provenance.strategy == "x"


def test_provenance_may_be_absent() -> None:
    data = _data()
    del data["provenance"]
    assert BitPlan.from_dict(data).provenance == Provenance()


def _layer(**bits: object) -> dict[str, object]:
    return {LAYER: {"w13": [3, 2], "w2": [3, 2], **bits}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2 is not supported"),
        ({"format_version": None}, "format_version None"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"group_size": 48}, "group_size 48"),
        ({"group_size": "64"}, "group_size '64'"),
        ({"group_size": 64.0}, "group_size 64.0"),
        ({"expert_bits": {}}, "expert_bits is empty"),
        ({"expert_bits": [1]}, "expert_bits must be an object"),
        ({"expert_bits": {LAYER: [3, 2]}}, f"'{LAYER}'.*'w13' and 'w2'"),
        ({"expert_bits": {LAYER: {"w13": [3]}}}, f"'{LAYER}'.*'w13' and 'w2'"),
        ({"expert_bits": _layer(w3=[2, 2])}, f"'{LAYER}'.*exactly"),
        ({"expert_bits": _layer(w13=[])}, "'w13'.*must be a list"),
        ({"expert_bits": _layer(w13="32")}, "'w13'.*must be a list"),
        ({"expert_bits": _layer(w2=[3, 7])}, "'w2'.*width 7 of expert 1"),
        ({"expert_bits": _layer(w2=[3, "2"])}, "width '2' of expert 1"),
        ({"expert_bits": _layer(w13=[True, 2])}, "width True of expert 0"),
        ({"expert_bits": _layer(w13=[2.0, 2])}, "width 2.0 of expert 0"),
        ({"expert_bits": _layer(w13=[3, 2, 1])}, "'w13' lists 3 experts, 'w2' 2"),
        ({"provenance": [1]}, "provenance must be an object"),
        ({"provenance": {"requested_bits": "few"}}, "provenance.requested_bits .*'few'"),
        ({"provenance": {"details": None}}, "provenance.details"),
    ],
)
def test_a_malformed_part_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        BitPlan.from_dict(_data(**changes))


@pytest.mark.parametrize("key", ["format_version", "group_size", "expert_bits"])
def test_a_missing_key_is_named(key: str) -> None:
    data = _data()
    del data[key]
    with pytest.raises(FormatError, match=key):
        BitPlan.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "plan", 3])
def test_a_plan_must_be_an_object(data: object) -> None:
    with pytest.raises(FormatError, match="JSON object"):
        BitPlan.from_dict(data)
