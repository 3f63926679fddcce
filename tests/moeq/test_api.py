"""The Python API: equal to the command line, silent, and its progress told to a callback."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import moeq
from moeq import pipeline
from support.checkpoints import write_checkpoint
from support.cli import environment, run_moeq

TEXT = "".join(f"Line {i} of a text whose bytes are tokens, {i * i % 97}.\n" for i in range(400))
MEASURED: dict[str, Any] = {"bits": 2.5, "group_size": 32, "nsamples": 16, "seqlen": 48}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _options(parameters: dict[str, Any]) -> list[object]:
    return [
        word
        for name, value in parameters.items()
        for word in (f"--{name.replace('_', '-')}", value)
    ]


@pytest.mark.parametrize("calib", ["none", pytest.param("text", marks=pytest.mark.slow)])
def test_equal_calls_give_equal_bytes(
    calib: str, tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    parameters = {**MEASURED, "calib": text} if calib == "text" else {"bits": 3, "calib": "none"}
    done = run_moeq("quantize", model, "-o", tmp_path / "command", *_options(parameters))
    assert done.returncode == 0, done.stderr
    result = moeq.quantize(model, tmp_path / "api", **parameters)
    assert _files(tmp_path / "api") == _files(tmp_path / "command")
    assert result.written and result.path == tmp_path / "api"
    assert moeq.verify(result.path) == []


def test_a_result_tells_what_was_done(
    tiny_model: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps: dict[str, list[tuple[int, int]]] = {}

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        steps.setdefault(f"{stage}, {unit}", []).append((done, total))

    with caplog.at_level(logging.INFO, "moeq"):
        result = moeq.quantize(
            tiny_model("mixtral"), tmp_path / "out", calib=text, progress=progress, **MEASURED
        )
    assert capsys.readouterr() == ("", "")
    assert "16 x 48 tokens of text.txt" in caplog.text
    assert "without text it is much faster: `calib` none" in caplog.text
    assert "plan: auto: " in caplog.text

    assert set(steps) == {
        "gradients, layer",
        "round at 4 widths (gptq), expert",
        "evaluate, layer",
        "round, expert",
        "write, B",
    }
    for done in steps.values():
        assert done[0][0] == 0 and done[-1][0] == done[-1][1]
        assert done == sorted(done)

    size = 0
    for file in result.path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            size += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    assert result.plan.provenance.total_bytes == result.estimate.output_bytes == size
    tried = [plan["divergence"] for plan in result.tried]
    assert tried == sorted(tried) and len(tried) == 8
    assert result.plan.provenance.strategy == f"auto: {result.tried[0]['strategy']}"
    assert result.calibration is not None
    assert sum(result.calibration.token_counts) == 2 * 2 * 16 * 48  # layers, experts of a token
    assert [path.name for path in result.reports] == [
        "README.md",
        "moeq_measurement.json",
        "moeq_calibration.json",
    ]

    inspected = moeq.inspect(result.path)
    assert inspected.plan == result.plan
    assert inspected.calibration is not None
    assert inspected.calibration["tokens"] == 16 * 48


def test_dry_run_writes_nothing_and_estimates(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    result = moeq.quantize(model, tmp_path / "out", calib=text, dry_run=True, **MEASURED)
    assert not result.written and not result.reports and result.calibration is None
    assert result.estimate.measuring is not None and result.estimate.rounding is not None
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}
    without = moeq.quantize(model, tmp_path / "out", bits=2.5, calib=None, dry_run=True)
    assert without.estimate.measuring is None and without.estimate.rounding is None


def test_the_time_told_is_that_of_all_devices(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        "quantize", tiny_model("mixtral"), "-o", tmp_path / "out", "--bits", 2.5, "--group-size",
        32, "--calib", text, "--dry-run",
    )  # fmt: skip
    told = {}
    for devices in (["cpu"], ["cpu", "cpu:0"]):
        found = [*map(torch.device, devices)]
        monkeypatch.setattr(pipeline, "all_devices", lambda device, found=found: found)
        done = run_moeq(*command, "--json")
        assert done.returncode == 0, done.stderr
        told[len(devices)] = json.loads(done.stdout)["estimate"]
    one, two = told[1], told[2]
    assert two["workers"] == 2 * one["workers"] == 2 * one["measuring"]["at_once"]
    for stage in ("measuring", "rounding"):
        assert one[stage]["seconds"] > two[stage]["seconds"] > one[stage]["seconds"] / 2
    assert f"s with {two['workers']} workers, " in run_moeq(*command).stdout


@pytest.mark.slow
def test_a_plan_is_what_quantize_uses(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    model, path = tiny_model("mixtral"), tmp_path / "plan.json"
    plan = moeq.plan(model, path, calib=text, strategy="sensitivity", **MEASURED)
    assert moeq.inspect(path).plan == plan and moeq.inspect(path).calibration is None
    options: dict[str, Any] = {"nsamples": 16, "seqlen": 48, "calib": text}
    by_plan = moeq.quantize(model, tmp_path / "a", plan=plan, **options)
    at_once = moeq.quantize(
        model, tmp_path / "b", strategy="sensitivity", bits=2.5, group_size=32, **options
    )
    assert by_plan.plan == at_once.plan
    by_plan_files, at_once_files = _files(tmp_path / "a"), _files(tmp_path / "b")
    # What was measured is known only where it was measured.
    assert at_once_files.keys() - by_plan_files.keys() == {"moeq_measurement.json"}
    for name in by_plan_files.keys() - {"moeq_manifest.json"}:
        assert by_plan_files[name] == at_once_files[name]


def test_evaluate_and_compare(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    model, heldout = tiny_model("mixtral"), tmp_path / "heldout.txt"
    heldout.write_text(TEXT[::-1])
    packed = moeq.quantize(model, tmp_path / "out", bits=4, group_size=32, calib=None).path
    short: dict[str, Any] = {"nsamples": 4, "seqlen": 32}
    evaluation = moeq.evaluate(packed, against=model, text=heldout, **short)
    assert 0 < evaluation.total.divergence < 1
    findings = moeq.compare(
        model, tmp_path / "page", text=heldout, calib=text, bits=[2.5], methods=["rtn"],
        strategies=["combined"], group_size=32, random=2, **short,
    )  # fmt: skip
    assert {point.strategy for point in findings.points} == {"combined", "random:0", "random:1"}
    page = (tmp_path / "page" / "compare.html").read_text()
    assert str(model) not in page and model.name in page


def test_a_group_size_that_fits_the_model_is_taken(
    tiny_model: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, out = tiny_model("qwen2_moe"), tmp_path / "out"
    with caplog.at_level(logging.INFO, "moeq"):
        plan = moeq.quantize(model, out, bits=3, calib=None).plan
    assert plan.group_size == 64
    assert "group size: 64, which fits" in caplog.text
    # 176 columns become 192 either way; groups of 64 have fewer scales than those of 32.
    assert "64 does not divide the intermediate_size 176: serving takes the memory of 192" in (
        caplog.text
    )
    assert moeq.verify(out) == []
    stored = 0
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as handle:
            stored += sum(handle.get_tensor(name).nbytes for name in handle.keys())  # noqa: SIM118
    assert plan.provenance.total_bytes == stored  # of what is on disk, not of what is served
    assert moeq.plan(model, bits=3, calib=None, group_size=128).group_size == 128


def test_errors_name_parameters(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "small")
    with pytest.raises(moeq.MoeqError, match="`group_size` 128 does not divide the hidden_size 64"):
        moeq.quantize(small, tmp_path / "out", bits=3, group_size=128, calib=None)
    with pytest.raises(moeq.MoeqError, match=f"`output` {tmp_path} exists already"):
        moeq.quantize(tiny_model("mixtral"), tmp_path, calib=None)


def test_importing_takes_no_torch() -> None:
    program = "import moeq, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "False False\n", done.stderr
