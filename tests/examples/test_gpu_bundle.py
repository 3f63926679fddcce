"""The bundle for the GPU machine: what stays of libraries and wheels, and that vLLM finds us."""

import os
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile, ZipInfo

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"
PTX, MACHINE_CODE = 1, 2
MAGIC = b"\x50\xed\x55\xba"


@pytest.fixture(scope="module")
def gpu_bundle() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_bundle

        yield gpu_bundle
    finally:
        sys.path.remove(str(BENCHMARKS))


def fat_binary(*codes: tuple[int, int, bytes]) -> bytes:
    """Make one of (kind, compute capability, code) as nvcc lays it out."""
    entries = b"".join(
        struct.pack("<HHIQ", kind, 0x101, 64, len(code))
        + struct.pack("<IIII", 0, 0, 0, arch).ljust(48, b"\x01")
        + code
        for kind, arch, code in codes
    )
    return MAGIC + struct.pack("<HHQ", 1, 16, len(entries)) + entries


def test_only_code_that_the_gpu_runs_stays(gpu_bundle: ModuleType) -> None:
    first = (
        (MACHINE_CODE, 80, b"A" * 40), (MACHINE_CODE, 90, b"B" * 24),
        (MACHINE_CODE, 100, b"C" * 8), (PTX, 90, b"D" * 16),
    )  # fmt: skip
    second = ((PTX, 70, b"E" * 8), (PTX, 80, b"F" * 8), (PTX, 120, b"G" * 8))
    around = b"\x7fELF \xba\x55\xed\x50" + MAGIC + b"no binary at all"
    library = around + fat_binary(*first) + b"between" + fat_binary(*second) + b"end"
    kept = gpu_bundle.keep_architecture(library)
    assert len(kept) == len(library)
    expected = library
    for letter in b"ACDEG":
        expected = expected.replace(bytes([letter]) * 8, bytes(8))
    assert kept == expected
    assert b"B" * 24 in kept and b"F" * 8 in kept


def _wheel(path: Path, **members: tuple[bytes, int]) -> None:
    with ZipFile(path, "w") as archive:
        for name, (content, mode) in members.items():
            info = ZipInfo(name)
            info.external_attr = (0o100000 | mode) << 16
            archive.writestr(info, content)


def test_what_is_packed(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    library = fat_binary((MACHINE_CODE, 80, b"A" * 64), (MACHINE_CODE, 90, b"B" * 64))
    files = {
        "vllm/__init__.py": (b"", 0o644),
        "vllm/_moe_C_stable_libtorch.abi3.so": (library, 0o755),
        "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": (b"large", 0o755),
        "vllm/vllm_flash_attn/__init__.py": (b"", 0o644),
        "vllm/vllm-rs": (b"large", 0o755),
        "vllm/fused_moe/configs/E=8,N=1,device_name=NVIDIA_H100_80GB_HBM3.json": (b"{}", 0o644),
        "vllm/fused_moe/configs/E=8,N=1,device_name=AMD_Instinct_MI300X.json": (b"{}", 0o644),
    }
    _wheel(wheels / "vllm-1-py3-none-any.whl", **files)
    _wheel(wheels / "humming-1-py3-none-any.whl", **{"humming/nvrtc": (b"#!/bin/sh\n", 0o755)})
    bundle = tmp_path / "folder" / "site.tar.xz"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_bundle.py", wheels, bundle],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {bundle}, {bundle.stat().st_size} bytes\n"
    assert list(bundle.parent.iterdir()) == [bundle]
    with tarfile.open(bundle) as archive:
        archive.extractall(site, filter="tar")
    (info,) = site.glob("vllm_moeq-*.dist-info")
    assert {path.name for path in info.iterdir()} == {"METADATA", "entry_points.txt"}
    assert {str(path.relative_to(site)) for path in (site / "vllm").rglob("*.*")} == {
        "vllm/__init__.py",
        "vllm/_moe_C_stable_libtorch.abi3.so",
        "vllm/vllm_flash_attn/_vllm_fa2_C.py",
        "vllm/vllm_flash_attn/__init__.py",
        "vllm/fused_moe/configs/E=8,N=1,device_name=NVIDIA_H100_80GB_HBM3.json",
    }
    assert os.access(site / "humming" / "nvrtc", os.X_OK)
    moe = (site / "vllm" / "_moe_C_stable_libtorch.abi3.so").read_bytes()
    assert b"B" * 64 in moe and b"A" not in moe
    found = subprocess.run(
        [sys.executable, "-S", "-c", "from importlib.metadata import entry_points as e\n"
         "print([p.value for p in e(group='vllm.general_plugins')])"],
        env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "['vllm_moeq:register']\n"


def test_a_bundle_that_is_too_large_is_not_written(
    gpu_bundle: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_bundle, "LARGEST_BUNDLE", 10)
    monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", str(tmp_path), str(tmp_path / "b.tar.xz")])
    with pytest.raises(SystemExit, match="more than 10"):
        gpu_bundle.main()
    assert not list(tmp_path.iterdir())
