"""The GPU benchmark without a GPU: it runs to its end, and its table says what was measured."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moeq.bench import Shape, Widths
from moeq.bench.gpu import Figures, GpuContender, moeq_contender
from vllm_moeq.kernels import KERNELS

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"
CPU = torch.device("cpu")
SHAPE = Shape("tiny", 256, 128, 4, 2)


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[tuple[ModuleType, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_measure
        import gpu_moe

        yield gpu_moe, gpu_measure
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def gpu_moe(benchmarks: tuple[ModuleType, ModuleType]) -> ModuleType:
    return benchmarks[0]


@pytest.fixture(scope="module")
def gpu_measure(benchmarks: tuple[ModuleType, ModuleType]) -> ModuleType:
    return benchmarks[1]


@pytest.mark.slow
def test_the_command_runs_in_the_interpreter(tmp_path: Path) -> None:
    results = tmp_path / "results.md"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "offline")))
    done = subprocess.run(
        [
            sys.executable, str(BENCHMARKS / "gpu_moe.py"), "--device", "cpu", "--runs", "3",
            "--shapes", "128,128,2,1", "--tokens", "1", "--peers", "vLLM Marlin int4",
            "--seconds", "300", "--results", str(results),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = results.read_text()
    assert "This is no measurement" in text
    ours = re.findall(
        r"^\| 1, moeq \S+ bits \| not measured \|  \|  \|  \| ([\d.]+) \| ([\d.e+-]+) \|$",
        text,
        re.M,
    )
    assert len(ours) == 4  # two plans, two routings
    assert all(1e-5 < float(error) < 1.5e-2 for _, error in ours)
    assert (
        text.count("| 1, vLLM Marlin int4 | not measured: ValueError: it needs a CUDA GPU |") == 2
    )


def _ours(shape: Shape, group_size: int, device: torch.device) -> GpuContender:
    return moeq_contender("ours", shape, Widths((3, 2)), 64, len(KERNELS) - 1, device)


class _Lines(list[dict[str, Any]]):
    def note(self, **fields: Any) -> None:
        self.append(fields)


def test_contenders_that_fail_are_reported_and_the_rest_goes_on(
    gpu_moe: ModuleType, gpu_measure: ModuleType
) -> None:
    def cannot_be_made(*_: object) -> GpuContender:
        raise ImportError("no module | named\nx")

    def fails_later(shape: Shape, group_size: int, device: torch.device) -> GpuContender:
        made, calls = _ours(shape, group_size, device), 0

        def run(copy: int, x: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if len(x) == 2 and calls > 2:  # not while it gets ready
                raise RuntimeError("out of memory")
            return made.run(copy, x, w, ids)

        return GpuContender("", made.expert_bytes, 1, run, made.matrices)

    lines = _Lines()
    makes = {gpu_measure.OURS: _ours, "first": cannot_be_made, "second": fails_later}
    made = gpu_measure.prepare(SHAPE, makes, (1, 2), CPU, lines.note)
    assert list(made) == [gpu_measure.OURS, "second"]
    gpu_measure.measure(
        SHAPE, made, (1, 2), 3, CPU, float("inf"), lines.note, baseline=gpu_measure.OURS
    )
    found = gpu_moe.Table(SHAPE, (1, 2), [*makes])
    for line in json.loads(json.dumps(lines)):
        found.add(line)
    assert found.failures["skewed", 2, "second"] == "RuntimeError: out of memory"
    assert found.failures["uniform", 1, "first"] == "ImportError: no module / named x"
    assert found.ratios["uniform", 1, gpu_measure.OURS] == 1
    assert 0 < found.ratios["skewed", 1, "second"] < 100
    assert found.figures["uniform", 1, "second"].error < 5e-3
    assert math.isnan(found.figures["uniform", 1, gpu_measure.OURS].error)  # not asked for


def test_a_fault_of_the_device_is_reported(
    gpu_measure: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_measure, "time_interleaved", fault)
    lines = _Lines()
    made = {"ours": _ours(SHAPE, 64, CPU)}
    gpu_measure.measure(SHAPE, made, (1,), 3, CPU, float("inf"), lines.note)
    assert len(lines) == 2
    assert all("illegal memory access" in line["failure"] for line in lines)


def test_nothing_starts_after_the_deadline(gpu_moe: ModuleType, gpu_measure: ModuleType) -> None:
    lines = _Lines()
    gpu_measure.measure(SHAPE, {"ours": _ours(SHAPE, 64, CPU)}, (1,), 3, CPU, 0.0, lines.note)
    assert not lines
    found = gpu_moe.Table(SHAPE, (1,), ["ours"])
    assert "| 1, ours | not measured: the time was over |" in found.render("uniform", 1e12)


PROCESS = """
import json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
peer, ours = options["--peer"], OURS
def note(**fields):
    with open(options["--lines"], "a") as file:
        file.write(json.dumps(fields) + "\\n")
if peer == "slow":
    time.sleep(100)
if peer == "missing":
    sys.exit(note(name=peer, failure="ImportError: it is missing"))
note(ready=True)
assert float(sys.stdin.readline()) > 0
figures = dict(us=50.0, us_iqr=1.0, read_bytes=1e6, error=1e-3)
note(routing="uniform", tokens=1, name=ours, figures=figures, ratio=1.0)
note(routing="uniform", tokens=1, name=peer or "moeq 4 bits", figures=figures, ratio=2.0)
if peer == "crash":
    os.abort()
if peer == "hang":
    time.sleep(100)
note(routing="skewed", tokens=1, name=peer or "moeq 4 bits", figures=figures, ratio=3.0)
"""


def test_a_peer_that_crashes_hangs_or_is_slow_costs_no_other(
    gpu_moe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real processes that behave so; only the slow one uses up the time to get ready."""
    script = tmp_path / "process.py"
    script.write_text(PROCESS.replace("OURS", repr(gpu_moe.OURS)))
    monkeypatch.setattr(gpu_moe, "PATIENCE", 0.5)
    peers = ["slow", "missing", "crash", "hang", "good"]
    found = gpu_moe.Table(SHAPE, (1,), [gpu_moe.OURS, "moeq 4 bits", *peers])
    written: list[int] = []
    gpu_moe.measure(
        found, ["", *peers], [sys.executable, str(script)], 10.0,
        lambda: written.append(len(found.figures)),
    )  # fmt: skip
    uniform = {name for routing, _, name in found.figures if routing == "uniform"}
    skewed = {name for routing, _, name in found.figures if routing == "skewed"}
    assert uniform == {gpu_moe.OURS, "moeq 4 bits", "crash", "hang", "good"}
    assert skewed == {"moeq 4 bits", "good"}
    assert found.ratios["uniform", 1, "good"] == 2
    failures = {name: reason for (r, _, name), reason in found.failures.items() if r == "skewed"}
    assert failures["slow"].startswith("not ready after")
    assert failures["missing"] == "ImportError: it is missing"
    assert failures["crash"] == "its process ended with status -6"
    assert failures["hang"] == "it took too long"
    assert written == [3, 3, 4, 5, 7]


def test_the_table_of_made_up_figures(gpu_moe: ModuleType, tmp_path: Path) -> None:
    found = gpu_moe.Table(SHAPE, (1, 2), ["ours", "theirs"])
    found.figures["uniform", 1, "ours"] = Figures(50.04, 1.26, 120e6, 1.234e-3)
    found.figures["uniform", 2, "ours"] = Figures(100.0, 2.0, 120e6, 2e-3)
    found.ratios["uniform", 1, "ours"] = 1.257
    found.fail("theirs", "it is missing")
    path = tmp_path / "results.md"
    gpu_moe.write(found, path, 4e12, 15)
    text = path.read_text()
    assert "| µs | IQR | time / moeq 3/2 bits | of the HBM floor | MB read | error |" in text
    assert "| 1, ours | 50.0 | 1.3 | 1.26 | 60% | 120.00 | 1.2e-03 |" in text
    assert "| 2, ours | 100.0 | 2.0 |  | 30% | 120.00 | 2.0e-03 |" in text
    assert text.count("| not measured: it is missing |") == 4
    assert "at the 4000 GB/s of a large copy" in text
    assert "no measurement" not in text
    gpu_moe.write(found, path, 4e12, 15)
    assert path.read_text() == text  # the section is replaced


def test_marlin_order_is_that_of_the_layout_s_definition(gpu_moe: ModuleType) -> None:
    """Of one 16 x 64 tile, from the fragments of the tensor cores' instruction m16n8k16."""
    from gpu_contenders import marlin_pack

    rows, columns = 64, 16
    codes = torch.randint(16, (rows, columns), dtype=torch.uint8)
    permutation = torch.tensor([
        16 * (2 * (lane % 4) + k) + lane // 4 + 8 * half + 256 * tile
        for lane in range(32)
        for tile in range(4)
        for half, k in ((0, 0), (0, 8), (1, 0), (1, 8), (0, 1), (0, 9), (1, 1), (1, 9))
    ])  # fmt: skip
    packed = marlin_pack(codes, permutation)
    assert (packed.shape, packed.dtype) == ((1, 128), torch.int32)
    for lane in range(32):
        for tile in range(4):
            word = int(packed[0, 4 * lane + tile]) & 0xFFFFFFFF
            found = [word >> 4 * place & 15 for place in range(8)]
            n, k = 16 * tile + lane // 4, 2 * (lane % 4)
            expected = [
                codes[n + 8 * half, k + step]
                for half, step in ((0, 0), (0, 8), (1, 0), (1, 8), (0, 1), (0, 9), (1, 1), (1, 9))
            ]
            assert found == [int(code) for code in expected]
