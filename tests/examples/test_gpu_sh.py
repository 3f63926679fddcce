"""The script for the GPU machine: what it refuses, and that each of its parts can start."""

import os
import re
import subprocess
import tarfile
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
        ([], "expected gather, parts or run"),
        (["measure"], "expected gather, parts or run"),
        (["gather", "all"], "gather takes no arguments: all"),
        (["run", "everything"], "unknown part everything: choose of tests e2e mixtral calibrate"),
        (["run", "--fast"], "unknown option --fast"),
        (["run", "--out"], "--out needs a value"),
        (["run", "--seconds", "many"], "--seconds many is not 1 to 200"),
        (["run", "--seconds", "600"], "--seconds 600 is not 1 to 200"),
        (["run", "--budget", "all"], "--budget all is no number of seconds"),
        (["parts", "all"], "parts takes no arguments: all"),
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


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return the script in a folder of its own, which it may unpack things in."""
    script = tmp_path / "clone" / "examples" / "benchmarks" / "gpu.sh"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.read_text())
    return script


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Return a file in which a python3 notes how it is called; it fails for one shape."""
    log = tmp_path / "calls"
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\necho "$@" >>{log}\ncase "$*" in *"--shapes qwen3 "*) exit 3 ;; esac\n'
    )
    fake.chmod(0o755)
    return log


def _run(script: Path, calls: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    out = script.parents[3] / "out"
    path = f"{calls.parent / 'bin'}:/usr/bin:/bin"
    return _gpu_sh("run", "--out", str(out), *arguments, script=script, PATH=path)


def test_parts_run_one_after_another_and_failures_are_told(
    clone: Path, calls: Path, tmp_path: Path
) -> None:
    parts = ("tests", "tune", "qwen3", "olmoe", "e2e", "calibrate")
    done = _run(clone, calls, "--seconds", "90", *parts)
    assert done.returncode == 1, done.stderr
    assert re.findall(r"^== (?!\d).*", done.stdout, re.M) == [
        "== tests", "== tune", "== qwen3", "== qwen3 FAILED", "== olmoe", "== e2e", "== calibrate"
    ]  # fmt: skip
    found, out = calls.read_text().splitlines(), tmp_path / "out"
    assert sum(call.startswith("-m pytest -q -m gpu ") for call in found) == 1
    assert [call for call in found if call.startswith("examples/")] == [
        *(f"examples/benchmarks/gpu_moe.py --shapes {shape} --seconds 90 "
          f"--results {out}/RESULTS.md" for shape in ("qwen3", "olmoe")),
        f"examples/benchmarks/gpu_e2e.py --seconds 50 --results {out}/RESULTS.md",
        f"examples/benchmarks/gpu_calibration.py --results {out}/RESULTS.md",
    ]  # fmt: skip
    assert [call for call in found if "--tune" in call] == [
        f"-m moeq.cli bench --tune --shape {shape} --seconds 30"
        for shape in ("mixtral", "qwen3", "olmoe")
    ]
    assert {path.name for path in out.iterdir()} == {f"{part}.log" for part in parts}


def test_a_part_that_does_not_fit_the_budget_is_not_started(clone: Path, calls: Path) -> None:
    done = _run(clone, calls, "--budget", "235")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^== (\S+)$", done.stdout, re.M) == ["tests", "calibrate", "sanitizer"]
    assert re.search(r"^== e2e not started: it may take 240 s, and 23\d s are left$",
                     done.stdout, re.M)  # fmt: skip


def test_the_bundle_is_unpacked_once(clone: Path, calls: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clone" / "build" / "gpu"
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "stale").touch()
    stamps = []
    for number in (1, 1, 2):
        program = tmp_path / f"program{number}"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        with tarfile.open(folder / "site.tar.xz", "w:xz") as archive:
            info = archive.gettarinfo(program, f"./program{number}")
            info.mtime = 0
            with program.open("rb") as file:
                archive.addfile(info, file)
        done = _run(clone, calls, "tests")
        assert done.returncode == 0, done.stderr
        assert [path.name for path in (folder / "site").iterdir()] == [f"program{number}"]
        assert os.access(folder / "site" / f"program{number}", os.X_OK)
        stamps.append((folder / "site").stat().st_ctime_ns)
    assert stamps[0] == stamps[1] < stamps[2]


def test_every_part_ends_within_four_minutes_and_the_first_fit_the_budget() -> None:
    """The device is lent for 15 minutes, of which starting it takes some."""
    done = _gpu_sh("parts")
    assert done.returncode == 0
    found = [
        (name, int(seconds), int(total))
        for name, seconds, total in re.findall(
            r"^(\S+) +at most (\d+) s, +(\d+) s with those before$", done.stdout, re.M
        )
    ]
    assert [name for name, _, total in found if total <= 800] == ["tests", "e2e", "mixtral"]
    assert len(found) == 10
    assert all(seconds <= 240 for _, seconds, _ in found)


def test_its_shapes_are_known() -> None:
    found = re.search(r"^SHAPES=\((.*)\)$", SCRIPT.read_text(), re.M)
    assert found
    assert set(SHAPES) <= set(found[1].split())
