"""The GPU benchmark without a GPU: it runs to its end, and its table says what was measured."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

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
def gpu_moe() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_moe

        yield gpu_moe
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
def test_the_command_runs_in_the_interpreter(tmp_path: Path) -> None:
    results = tmp_path / "results.md"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "offline")))
    done = subprocess.run(
        [
            sys.executable, str(BENCHMARKS / "gpu_moe.py"), "--device", "cpu", "--runs", "3",
            "--shapes", "128,128,2,1", "--tokens", "1", "--results", str(results),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = results.read_text()
    assert "This is no measurement" in text
    ours = re.findall(
        r"^\| 1, moeq \S+ bits \| not measured \|  \|  \| ([\d.]+) \| ([\d.e+-]+) \|$", text, re.M
    )
    assert len(ours) == 4  # two plans, two routings
    assert all(1e-5 < float(error) < 1.5e-2 for _, error in ours)
    for name in ("Humming 3/2 bits", "Humming int4", "vLLM Marlin int4", "vLLM bf16"):
        assert f"| 1, {name} | not measured: ValueError: it needs a CUDA GPU |" in text


def _ours(shape: Shape, group_size: int, device: torch.device) -> GpuContender:
    return moeq_contender("ours", shape, Widths((3, 2)), 64, len(KERNELS) - 1, device)


def test_contenders_that_fail_are_reported_and_the_rest_goes_on(gpu_moe: ModuleType) -> None:
    def cannot_be_made(*_: object) -> GpuContender:
        raise ImportError("no module | named\nx")

    def fails_with_two(shape: Shape, group_size: int, device: torch.device) -> GpuContender:
        made = _ours(shape, group_size, device)

        def run(copy: int, x: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            if len(x) == 2:
                raise RuntimeError("out of memory")
            return made.run(copy, x, w, ids)

        return GpuContender("", made.expert_bytes, 1, run, made.matrices)

    found = gpu_moe.Table(SHAPE, (1, 2), ["first", "second", "third"])
    makers = [("first", cannot_be_made), ("second", fails_with_two), ("third", _ours)]
    written: list[int] = []
    gpu_moe.measure(found, makers, 3, CPU, float("inf"), lambda: written.append(len(found.figures)))
    assert written == [4, 6]
    assert {name for _, _, name in found.figures} == {"second", "third"}
    assert found.failures["skewed", 2, "second"] == "RuntimeError: out of memory"
    assert found.failures["uniform", 1, "first"] == "ImportError: no module / named x"
    assert all(figure.error < 5e-3 for figure in found.figures.values())


def test_a_fault_of_the_device_is_reported(
    gpu_moe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_moe, "time_interleaved", fault)
    found = gpu_moe.Table(SHAPE, (1,), ["ours"])
    gpu_moe.measure(found, [("ours", _ours)], 3, CPU, float("inf"), lambda: None)
    assert not found.figures
    assert "illegal memory access" in found.failures["uniform", 1, "ours"]


def test_nothing_starts_after_the_deadline(gpu_moe: ModuleType) -> None:
    found = gpu_moe.Table(SHAPE, (1,), ["ours"])
    gpu_moe.measure(found, [("ours", _ours)], 3, CPU, 0.0, lambda: None)
    assert not found.figures
    assert "| 1, ours | not measured: the time was over |" in found.render("uniform", 1e12)


def test_the_table_of_made_up_figures(gpu_moe: ModuleType, tmp_path: Path) -> None:
    found = gpu_moe.Table(SHAPE, (1, 2), ["ours", "theirs"])
    found.figures["uniform", 1, "ours"] = Figures(50.04, 1.26, 120e6, 1.234e-3)
    found.figures["uniform", 2, "ours"] = Figures(100.0, 2.0, 120e6, 2e-3)
    found.fail("theirs", "it is missing")
    path = tmp_path / "results.md"
    gpu_moe.write(found, path, 4e12, 15)
    text = path.read_text()
    assert "| tokens, contender | µs | IQR | of the HBM floor | MB read | error |" in text
    assert "| 1, ours | 50.0 | 1.3 | 60% | 120.00 | 1.2e-03 |" in text
    assert "| 2, ours | 100.0 | 2.0 | 30% | 120.00 | 2.0e-03 |" in text
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
