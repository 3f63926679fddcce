"""What a plan says of itself holds for its widths and its rounding, or is not said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moeq

TEXT = "".join(f"Line {i} of a text whose bytes are tokens, {i * i % 97}.\n" for i in range(300))
PARAMETERS: dict[str, Any] = {"nsamples": 12, "seqlen": 40}


@pytest.fixture(scope="module")
def planned(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("stamp")
    text, path = folder / "text.txt", folder / "plan.json"
    text.write_text(TEXT)
    model = tiny_model("mixtral")
    moeq.plan(model, path, bits=2.5, group_size=32, calib=text, method="rtn", **PARAMETERS)
    return model, text, path


def test_a_plan_that_is_used_as_it_was_measured_keeps_what_was_measured(
    planned: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, _, path = planned
    result = moeq.quantize(model, tmp_path / "out", plan=path, method="rtn", calib=None)
    assert len(result.tried) > 3
    assert result.plan.provenance.strategy.startswith("auto: ")
    assert "tokens held back" in (tmp_path / "out" / "README.md").read_text()


def test_an_edited_plan_does_not_speak_for_itself(
    planned: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, _, path = planned
    plan = json.loads(path.read_text())
    bits = next(iter(plan["expert_bits"].values()))
    bits["w2"][0] = 1 if bits["w2"][0] != 1 else 2
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    result = moeq.quantize(
        model, tmp_path / "out", plan=tmp_path / "edited.json", method="rtn", calib=None
    )
    assert result.tried == []
    assert result.plan.provenance.strategy.startswith("edited (was auto: ")
    assert "estimated_divergence" not in result.plan.provenance.details
    assert "held back" not in (tmp_path / "out" / "README.md").read_text()


def test_another_rounding_was_not_measured(
    planned: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, _, path = planned
    result = moeq.quantize(model, tmp_path / "out", plan=path, method="hqq", calib=None)
    assert result.tried == []
    assert result.plan.provenance.strategy.startswith("auto: ")


def test_no_path_of_this_machine_gets_into_a_checkpoint(
    planned: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, text, _ = planned
    out = tmp_path / "out"
    moeq.quantize(model, out, bits=2.5, group_size=32, calib=text, method="rtn", **PARAMETERS)
    for file in ("config.json", "README.md", "moeq_measurement.json"):
        assert str(model.parent) not in (out / file).read_text(), file
