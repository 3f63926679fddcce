"""Builds the C++ kernel: once for each instruction set, compiler and version of the sources.

Imports nothing but the standard library, so that the build of a wheel can use it too.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "prebuilt"
CACHE_VARIABLE = "MOEQ_CACHE_DIR"
"""Environment variable for the folder of compiled kernels; default ``~/.cache/moeq``."""
_TIMEOUT_S = 600


class BuildError(Exception):
    """The kernel cannot be built here; the message says why."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """One build of the kernel.

    Attributes:
        name: Value of ``MOEQ_CPU_ISA`` that chooses it.
        cpu_flags: What the CPU must have, in the words of ``/proc/cpuinfo``.
        compiler_flags: Options that choose it, for gcc and clang.
    """

    name: str
    cpu_flags: frozenset[str]
    compiler_flags: tuple[str, ...]

    def runs_here(self) -> bool:
        """Whether this CPU, and its operating system, can run it."""
        return platform.machine() == "x86_64" and self.cpu_flags <= _cpu_flags()


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
_AVX512_FLAGS = tuple(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))

INSTRUCTION_SETS = (
    InstructionSet("avx512_vnni", _AVX512, (*_AVX2_FLAGS, *_AVX512_FLAGS)),
    InstructionSet("avx2", _AVX2, (*_AVX2_FLAGS, "-DMOEQ_ISA_AVX2")),
)
"""What the kernel is made for, the fastest first."""
PORTABLE = InstructionSet("portable", _AVX2, _AVX2_FLAGS)
"""The AVX-512 kernel made of smaller vectors: slow, to test it on CPUs without AVX-512."""

_COMPILE_FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), ":")
    return frozenset(flags.partition(":")[2].split())


def library_path(isa: InstructionSet) -> Path:
    """Return the compiled kernel for ``isa``; compile it if it is neither packaged nor cached.

    Several processes may ask at once: one compiles, the others wait for it. A process killed while
    compiling leaves nothing that hinders the next one.

    Raises:
        BuildError: No compiler, or the compiler failed.
    """
    packaged = PREBUILT / _file_name(isa, source_hash())
    if packaged.exists():
        return packaged
    compiler = find_compiler()
    key = hashlib.sha256("\n".join([source_hash(), *_version(compiler)]).encode()).hexdigest()
    folder = _cache_folder()
    library = folder / _file_name(isa, key)
    if library.exists():
        return library
    # The kernel of the operating system drops the lock with the process, however that ends.
    with open(library.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            logger.warning(
                "compiling the moeq CPU kernel for %s, once: about half a minute", isa.name
            )
            compile_library(isa, library, compiler)
    return library


def compile_library(
    isa: InstructionSet, library: Path, compiler: tuple[str, ...], extra: tuple[str, ...] = ()
) -> None:
    """Compile the kernel into ``library``, which appears complete or not at all.

    OpenMP is compiled in but not linked: its functions come from the runtime that torch has
    loaded, so that there is one pool of threads and vLLM's settings hold.

    Raises:
        BuildError: The compiler failed; with its last messages.
    """
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        result = Path(folder, library.name)
        object_file = result.with_suffix(".o")
        flags = (*_COMPILE_FLAGS, *isa.compiler_flags, *extra)
        _run(*compiler, *flags, "-c", str(SOURCES / "moe.cpp"), "-o", str(object_file))
        _run(*compiler, "-shared", *extra, str(object_file), "-o", str(result))
        os.replace(result, library)


def find_compiler() -> tuple[str, ...]:
    """Return the command of the C++ compiler: ``CXX``, else the first of g++, c++, clang++.

    Raises:
        BuildError: There is none.
    """
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "c++", "clang++"]:
        command = shlex.split(name)
        path = shutil.which(command[0]) if command else None
        if path:
            return (path, *command[1:])
    if chosen:
        raise BuildError(f"the C++ compiler CXX={chosen!r} was not found")
    raise BuildError("there is no C++ compiler; install one (for example g++ 11 or newer)")


@cache
def source_hash() -> str:
    """Return a hash of the sources and of how they are compiled."""
    flags = [isa.compiler_flags for isa in (*INSTRUCTION_SETS, PORTABLE)]
    digest = hashlib.sha256(repr((_COMPILE_FLAGS, flags)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _file_name(isa: InstructionSet, key: str) -> str:
    return f"moeq-{isa.name}-{key[:16]}.so"


def _version(compiler: tuple[str, ...]) -> tuple[str, ...]:
    return (*compiler, _run(*compiler, "--version"), platform.machine())


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"`{shlex.join(command)}` failed: {error}") from error
    if done.returncode:
        messages = "\n".join(done.stderr.splitlines()[-10:])
        raise BuildError(f"`{shlex.join(command)}` failed:\n{messages}")
    return done.stdout


def _cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "moeq")
    folder = Path(os.environ.get(CACHE_VARIABLE) or default)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"cannot create {folder} for the compiled kernel: {error}; set {CACHE_VARIABLE} to "
            "a folder that can be written"
        ) from error
    if not os.access(folder, os.W_OK):
        raise BuildError(f"{folder} cannot be written; set {CACHE_VARIABLE} to another folder")
    return folder
