"""``moeq doctor``: what it looks at, in a real process and on a machine made to lack things."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeq.cli import main
from support.checkpoints import write_checkpoint
from support.cli import run_moeq_alone


@pytest.mark.vllm
def test_versions_kernels_and_space_are_told_in_a_real_process() -> None:
    done = run_moeq_alone("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert found["torch"]["text"] == torch.__version__
    assert found["vLLM"]["state"] == "ok"
    assert "kernel " in found["CPU"]["text"]
    free = shutil.disk_usage(".").free
    assert float(found["disk"]["text"].split()[0]) == pytest.approx(free / 1e9, rel=0.1)


def test_a_model_is_compared_with_what_there_is(
    tiny_model: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    command = ["doctor", str(tiny_model("mixtral")), "--folder", str(tmp_path), "--json"]
    main(command)
    rows = json.loads(capsys.readouterr().out)
    states = {row["name"]: row["state"] for row in rows}
    assert states["quantize, with text"] == states["write"] == states["serve on the CPU"] == "ok"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("moeq.bench.machine.available_bytes", lambda: 1000)
    assert main(command) == 1
    rows = json.loads(capsys.readouterr().out)
    states = {row["name"]: row["state"] for row in rows}
    assert states["quantize, with text"] == states["serve on the CPU"] == "problem"


def test_a_wrong_kernel_variable_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEQ_KERNEL", "quantum")
    assert main(["doctor"]) == 1
    assert "problem" in capsys.readouterr().out


def test_what_is_broken_is_a_problem_and_the_rest_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "model")  # no tokenizer, and rows that 128 does not divide
    assert main(["doctor", str(model), "--folder", str(tmp_path / "nowhere"), "--json"]) == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["torch"]["state"] == "ok"
    assert rows["space"]["state"] == "problem" and "nowhere" in rows["space"]["text"]
    assert rows["model"]["state"] == "problem"
