"""The script for the GPU machine: what it refuses, and that each of its parts can start."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from moeq.bench import SHAPES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "benchmarks" / "gpu.sh"


def _gpu_sh(
    *arguments: str, script: Path = SCRIPT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected gather or run"),
        (["measure"], "expected gather or run"),
        (["gather", "all"], "gather takes no arguments: all"),
        (["run", "everything"], "unknown part everything: choose of tests sanitizer tune mixtral"),
        (["run", "--fast"], "unknown option --fast"),
        (["run", "--out"], "--out needs a value"),
        (["run", "--seconds", "many"], "--seconds many is not 1 to 180"),
        (["run", "--seconds", "600"], "--seconds 600 is not 1 to 180"),
    ],
)
def test_wrong_usage_exits_with_status_2(arguments: list[str], message: str) -> None:
    done = _gpu_sh(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpu.sh: {message}")
    assert "gpu.sh run [--out DIR]" in done.stderr


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = _gpu_sh("run", "--out", str(tmp_path / "out"), "tests", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (1, "gpu.sh: torch finds no CUDA GPU here\n")
    assert not (tmp_path / "out").exists()


def test_parts_run_one_after_another_and_failures_are_told(tmp_path: Path) -> None:
    """With a python3 that only notes how it is called, and fails for one shape."""
    script = tmp_path / "clone" / "examples" / "benchmarks" / "gpu.sh"  # which may unpack things
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.read_text())
    log = tmp_path / "calls"
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\necho "$@" >>{log}\ncase "$*" in *"--shapes qwen3 "*) exit 3 ;; esac\n'
    )
    fake.chmod(0o755)
    path = f"{fake.parent}:/usr/bin:/bin"
    out = tmp_path / "out"
    done = _gpu_sh("run", "--seconds", "90", "--out", str(out), "tests", "tune", "qwen3", "olmoe",
                   script=script, PATH=path)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert re.findall(r"^== .*", done.stdout, re.M) == [
        "== tests", "== tune", "== qwen3", "== qwen3 FAILED", "== olmoe"
    ]  # fmt: skip
    calls = log.read_text().splitlines()
    assert sum(call.startswith("-m pytest -q -m gpu ") for call in calls) == 1
    assert [call for call in calls if "gpu_moe.py" in call] == [
        f"examples/benchmarks/gpu_moe.py --shapes {shape} --seconds 90 --results {out}/RESULTS.md"
        for shape in ("qwen3", "olmoe")
    ]
    assert [call for call in calls if "--tune" in call] == [
        f"-m moeq.cli bench --tune --shape {shape} --seconds 30"
        for shape in ("mixtral", "qwen3", "olmoe")
    ]
    assert {path.name for path in out.iterdir()} == {
        "tests.log", "tune.log", "qwen3.log", "olmoe.log"
    }  # fmt: skip


def test_its_shapes_are_known() -> None:
    found = re.search(r"^SHAPES=\((.*)\)$", SCRIPT.read_text(), re.M)
    assert found
    assert set(SHAPES) <= set(found[1].split())
