"""Compiling the CPU kernel at first use, with real processes and a real compiler.

Most tests compile a copy of the package's build with a source of one line, which takes no time; one
compiles the kernel itself.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from vllm_moeq.kernels import select_kernel
from vllm_moeq.kernels.cpu import build
from vllm_moeq.kernels.cpu.build import INSTRUCTION_SETS

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[4]
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if name not in ("CXX", "MOEQ_CACHE_DIR", "MOEQ_CPU_ISA", "MOEQ_KERNEL")
}
SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
ASK = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
import build
from vllm_moeq import envs
isas = {isa.name: isa for isa in (*build.INSTRUCTION_SETS, build.PORTABLE)}
path = build.cached_library(isas[sys.argv[2]], envs.cache_dir())
assert ctypes.CDLL(str(path)).answer() == 42
print(path)
"""
# Each compilation adds a line to the log and then waits.
COMPILER = """#!/bin/sh
case "$*" in
  *--version) echo {version};;
  *" -c "*) echo compiling >>"{log}"; sleep "${{TEST_WAIT:-0}}";;
esac
exec {real} "$@"
"""


@dataclass
class Compiler:
    """A compiler command that counts its compilations."""

    path: Path
    log: Path

    @property
    def compilations(self) -> int:
        """How often it has compiled, or begun to."""
        return self.log.read_text().count("\n") if self.log.exists() else 0

    def wait_until_it_runs(self) -> None:
        """Wait for the first compilation to begin."""
        deadline = time.monotonic() + 60
        while not self.compilations:
            assert time.monotonic() < deadline, "no compilation has started"
            time.sleep(0.02)


def _script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def _compiler(folder: Path, name: str = "compiler", version: str = "version 1") -> Compiler:
    real = next((path for path in map(shutil.which, ["g++", "c++"]) if path), None)
    if real is None:
        pytest.skip("needs a C++ compiler")
    log = folder / f"{name}.log"
    text = COMPILER.format(version=version, log=log, real=real)
    return Compiler(_script(folder / name, text), log)


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    return _compiler(tmp_path)


@dataclass
class Project:
    """A copy of the package's build with a small source, and a cache of its own."""

    folder: Path
    cache: Path

    def start(self, cxx: object, isa: str = "avx2", **variables: str) -> subprocess.Popen[str]:
        """Start a process that wants the library."""
        own = {
            "CXX": str(cxx), "MOEQ_CACHE_DIR": str(self.cache), "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", ASK, str(self.folder), isa],
            env=CLEAN | own | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def library(self, cxx: object, isa: str = "avx2", **variables: str) -> Path:
        """Return the library that a process of its own got."""
        return _finish(self.start(cxx, isa, **variables))

    def error(self, cxx: object, **variables: str) -> str:
        """Return the exception of a process that got none."""
        process = self.start(cxx, **variables)
        _, messages = process.communicate(timeout=60)
        assert process.returncode
        _, found, text = messages.rpartition("build.BuildError: ")
        assert found, messages
        return text

    def files(self) -> list[str]:
        """Return the suffixes of what is in the cache."""
        return sorted(path.suffix for path in self.cache.iterdir())


def _finish(process: subprocess.Popen[str]) -> Path:
    output, messages = process.communicate(timeout=60)
    assert process.returncode == 0, messages
    return Path(output.strip())


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = tmp_path / "package"
    (folder / "csrc").mkdir(parents=True)
    shutil.copy(build.__file__, folder)
    (folder / "csrc" / "moe.cpp").write_text(SOURCE)
    return Project(folder, tmp_path / "cache")


def test_one_compilation_serves_all_later_processes(project: Project, compiler: Compiler) -> None:
    first = project.library(compiler.path)
    assert first.parent == project.cache
    assert [project.library(compiler.path) for _ in range(2)] == [first, first]
    assert compiler.compilations == 1
    assert project.files() == [".lock", ".so"]


def test_all_that_changes_the_library_has_a_file_of_its_own(
    project: Project, compiler: Compiler, tmp_path: Path
) -> None:
    other_path = _compiler(tmp_path, "other")
    libraries = [
        project.library(compiler.path),
        project.library(compiler.path, isa="avx512_vnni"),
        project.library(f"{compiler.path} -DMOEQ_OTHER"),
        project.library(other_path.path),
    ]
    upgraded = _compiler(tmp_path, version="version 2")
    libraries.append(project.library(upgraded.path))
    source = project.folder / "csrc" / "moe.cpp"
    source.write_text(SOURCE + "// changed\n")
    libraries.append(project.library(compiler.path))
    (source.parent / "added.h").touch()
    libraries.append(project.library(compiler.path))
    assert len(set(libraries)) == len(libraries)
    assert compiler.compilations + other_path.compilations == len(libraries)

    _compiler(tmp_path)
    (source.parent / "added.h").unlink()
    source.write_text(SOURCE)
    (source.parent / ".moe.cpp.swp").touch()
    assert project.library(compiler.path) == libraries[0], "the first one is still there"


def test_processes_that_start_together_compile_once(project: Project, compiler: Compiler) -> None:
    processes = [project.start(compiler.path, TEST_WAIT="1") for _ in range(4)]
    libraries = {_finish(process) for process in processes}
    assert len(libraries) == compiler.compilations == 1


def test_a_process_killed_while_compiling_hinders_nobody(
    project: Project, compiler: Compiler
) -> None:
    killed = project.start(compiler.path, TEST_WAIT="60")
    try:
        compiler.wait_until_it_runs()
        waiting = project.start(compiler.path)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        killed.kill()  # its compiler goes on
        library = _finish(waiting)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
    assert project.library(compiler.path) == library
    assert compiler.compilations == 2
    assert project.files() == [".lock", ".so"], "the temporary folder of the killed one is left"


def test_two_instruction_sets_compile_at_once(project: Project, compiler: Compiler) -> None:
    slow = project.start(compiler.path, isa="portable", TEST_WAIT="2")
    compiler.wait_until_it_runs()
    project.library(compiler.path)
    assert slow.poll() is None, "the fast one has waited"
    _finish(slow)
    assert project.files() == [".lock", ".lock", ".so", ".so"]


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_library_that_was_cut_short_is_compiled_again(
    project: Project, compiler: Compiler, share: float
) -> None:
    library = project.library(compiler.path)
    content = library.read_bytes()
    library.write_bytes(content[: int(share * len(content))])
    assert project.library(compiler.path) == library
    assert library.read_bytes()[-32:] == content[-32:]
    assert compiler.compilations == 2


def test_messages_of_a_compiler_that_fails_are_shown(project: Project, compiler: Compiler) -> None:
    (project.folder / "csrc" / "moe.cpp").write_text('#error "this compiler is too old"\n')
    message = project.error(compiler.path)
    assert "-O3" in message and "this compiler is too old" in message
    assert project.files() == [".lock"]


@pytest.mark.parametrize(
    ("cxx", "expected"),
    [
        ("no-such-compiler -O3", "CXX='no-such-compiler -O3' was not found"),
        ("false", "false --version` failed (1)"),
        ("", "there is no C++ compiler; install one"),
    ],
)
def test_an_unusable_compiler_is_named(project: Project, cxx: str, expected: str) -> None:
    path = CLEAN["PATH"] if cxx else str(project.folder)
    assert expected in project.error(cxx, PATH=path)


@pytest.mark.parametrize("name", ["", "below"])
def test_a_cache_that_cannot_be_written_is_named(
    project: Project, compiler: Compiler, name: str
) -> None:
    project.cache.touch()
    project.cache /= name
    message = project.error(compiler.path)
    assert str(project.cache) in message and "set MOEQ_CACHE_DIR to another folder" in message


def test_a_cache_named_relative_to_the_current_folder(
    project: Project, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    project.cache = Path(".")
    assert project.library(compiler.path).parent == tmp_path


def test_the_default_cache_is_in_the_home_folder(
    project: Project, compiler: Compiler, tmp_path: Path
) -> None:
    variables = {"MOEQ_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": str(tmp_path)}
    library = project.library(compiler.path, **variables)
    assert library.parent == tmp_path / ".cache" / "moeq"
    variables["XDG_CACHE_HOME"] = str(tmp_path / "xdg")
    assert project.library(compiler.path, **variables).parent == tmp_path / "xdg" / "moeq"


def _python(code: str, **variables: str) -> subprocess.Popen[str]:
    """Start a process that can import the package."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=CLEAN | {"PYTHONPATH": str(REPOSITORY)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _has_a_kernel() -> bool:
    return any(isa.runs_here() for isa in INSTRUCTION_SETS)


def test_without_a_compiler_one_warning_says_what_to_do(tmp_path: Path) -> None:
    code = """
import os, torch
from vllm_moeq.kernels import KERNELS, select_kernel
for _ in range(3):
    print(KERNELS[select_kernel(torch.device("cpu"))].name)
os.environ["MOEQ_KERNEL"] = "cpu"
try:
    select_kernel(torch.device("cpu"))
except ValueError as error:
    print(error)
"""
    process = _python(code, PATH=str(tmp_path), MOEQ_CACHE_DIR=str(tmp_path))
    output, messages = process.communicate(timeout=60)
    *names, reason = output.splitlines()
    assert names == ["reference"] * 3
    assert reason.startswith("MOEQ_KERNEL='cpu' cannot run on cpu: ")
    [warning] = messages.splitlines()
    assert "slow torch code" in warning
    if _has_a_kernel():
        for text in (reason, warning):
            assert "there is no C++ compiler; install one" in text


@pytest.mark.usefixtures("new_cpu_kernel")
def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEQ_CPU_ISA", "sse2")
    with pytest.raises(ValueError, match="MOEQ_CPU_ISA='sse2' is not one of .*'avx2'"):
        select_kernel(CPU)


@pytest.mark.usefixtures("new_cpu_kernel")
def test_an_instruction_set_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = next((isa for isa in INSTRUCTION_SETS if not isa.runs_here()), None)
    if lacking is None:
        pytest.skip("this CPU has them all")
    monkeypatch.setenv("MOEQ_CPU_ISA", lacking.name)
    with pytest.raises(ValueError, match=f"MOEQ_CPU_ISA='{lacking.name}' needs a CPU with .*avx"):
        select_kernel(CPU)


@pytest.mark.slow
@pytest.mark.skipif(not _has_a_kernel(), reason="needs x86-64 with AVX2")
def test_the_kernel_compiles_once_and_has_no_openmp_of_its_own(
    compiler: Compiler, tmp_path: Path
) -> None:
    code = """
import os, pathlib, torch
from vllm_moeq.kernels.cpu import library
functions = library.load()
memory = torch.zeros(1 << 20, dtype=torch.uint8)

def started_threads():
    before = len(os.listdir("/proc/self/task"))
    functions.moeq_read(memory.data_ptr(), memory.numel())
    return len(os.listdir("/proc/self/task")) - before

at_first = started_threads()
torch.set_num_threads(3)
mapped = {line.split()[-1] for line in open("/proc/self/maps")}
runtimes = [path for path in mapped if "omp" in pathlib.Path(path).name]
print(functions.moeq_isa().decode(), at_first, started_threads(), len(runtimes))
"""
    variables = {
        "CXX": str(compiler.path),
        "MOEQ_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    isa = next(isa.name for isa in INSTRUCTION_SETS if isa.runs_here())
    for process in [_python(code, **variables) for _ in range(2)]:
        output, messages = process.communicate(timeout=600)
        assert process.returncode == 0, messages
        # torch's number of threads holds, not OMP_NUM_THREADS; there is one OpenMP runtime.
        assert output.split() == [isa, "0", "2", "1"]
    assert compiler.compilations == 1
    [library] = (tmp_path / "cache").glob("*.so")
    assert b"gomp" not in library.read_bytes()


PERMITTED = """
import ctypes
from vllm_moeq.kernels.cpu import library
features = ctypes.c_uint64()
library.load()
assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(features)) == 0
print(features.value >> 18 & 1)
"""


@pytest.mark.skipif(
    "amx_tile" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"), reason="needs AMX"
)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_process_that_loads_the_kernel_may_use_amx(isa: build.InstructionSet) -> None:
    """So do vLLM's kernels, which otherwise may be the first to and end the process."""
    done = subprocess.run(
        [sys.executable, "-c", PERMITTED],
        env={**CLEAN, "MOEQ_CPU_ISA": isa.name},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("allowed", [True, False])
def test_amx_runs_where_the_system_allows_it(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    has = "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    monkeypatch.setattr(build, "_amx_allowed", lambda: allowed)
    build._cpu_flags.cache_clear()
    try:
        runs = {isa.name: isa.runs_here() for isa in INSTRUCTION_SETS}
    finally:
        build._cpu_flags.cache_clear()
    assert runs["amx_int8"] == (has and allowed)
    assert runs["avx512_vnni"] or not runs["amx_int8"]
