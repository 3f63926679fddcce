"""Builds the C++ kernel: once for each instruction set, compiler and version of the sources.

Imports nothing but the standard library, so that the build of a wheel can use it too.
"""

import ctypes
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
_KERNEL, _OPS = "moe.cpp", "ops.cpp"
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
    InstructionSet(
        "amx_int8",
        _AVX512 | {"amx_tile", "amx_int8"},
        (*_AVX2_FLAGS, *_AVX512_FLAGS, "-DMOEQ_ISA_AMX"),
    ),
    InstructionSet("avx512_vnni", _AVX512, (*_AVX2_FLAGS, *_AVX512_FLAGS)),
    InstructionSet("avx2", _AVX2, (*_AVX2_FLAGS, "-DMOEQ_ISA_AVX2")),
)
"""What the kernel is made for, the fastest first."""
PORTABLE = InstructionSet("portable", _AVX2, (*_AVX2_FLAGS, "-O1"))
"""The AMX kernel, and with it AVX-512's, made of smaller vectors: slow, to test them anywhere."""

_LIBRARY_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden")
_KERNEL_FLAGS = (
    *_LIBRARY_FLAGS, "-O3", "-fopenmp", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast",
)  # fmt: skip
_OPS_FLAGS = (*_LIBRARY_FLAGS, "-O2")


@dataclass(frozen=True, slots=True)
class Target:
    """A library that is compiled.

    Attributes:
        name: What its file is called after.
        source: Its file among the sources.
        compile_flags: Options of the compiler.
        link_flags: Options that link it.
    """

    name: str
    source: str
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...] = ()

    @classmethod
    def kernel(cls, isa: InstructionSet) -> "Target":
        """Return the kernel for one instruction set.

        OpenMP is compiled in but not linked: its functions come from the runtime that torch has
        loaded, so that there is one pool of threads and vLLM's settings hold.
        """
        return cls(isa.name, _KERNEL, (*_KERNEL_FLAGS, *isa.compiler_flags))

    @classmethod
    def ops(cls, torch_folder: Path, torch_version: str) -> "Target":
        """Return torch's ops for one release of torch, which has loaded its libraries itself."""
        include, lib = torch_folder / "include", torch_folder / "lib"
        headers = ("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"))
        linked = (f"-L{lib}", "-ltorch_cpu", "-lc10")
        return cls(f"ops-torch-{torch_version}", _OPS, (*_OPS_FLAGS, *headers), linked)


@cache
def _cpu_flags() -> frozenset[str]:
    """Return what the CPU has and this process may use; asks Linux for what it has to allow."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith("flags")), ":")
    flags = frozenset(line.partition(":")[2].split())
    return flags if "amx_tile" in flags and _amx_allowed() else flags - {"amx_tile"}


def _amx_allowed() -> bool:
    """Ask Linux for AMX's registers, which it gives to processes that ask, for good.

    vLLM's own kernels count on somebody having asked: oneDNN does with its first product, which a
    model may lack whose layers are all packed.
    """
    call, request, tile_data = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM, its register set
    return bool(ctypes.CDLL(None).syscall(call, request, tile_data) == 0)


def packaged_library(isa: InstructionSet) -> Path | None:
    """Return the kernel that a wheel brought along, None if there is none."""
    library = PREBUILT / _file_name(isa.name, source_hash())
    return library if library.exists() else None


def cached_library(isa: InstructionSet, folder: Path) -> Path:
    """Return the kernel compiled for ``isa``; compile it into ``folder`` if it is not there.

    Several processes may ask at once: one compiles, the others wait for it. A process killed while
    compiling leaves nothing that hinders the next one.

    Raises:
        BuildError: No compiler, the compiler failed, or the folder cannot be written.
    """
    return _cached(Target.kernel(isa), folder)


def cached_ops(torch_folder: Path, torch_version: str, folder: Path) -> Path:
    """Return torch's ops in C++ for one release of torch, as :func:`cached_library` does.

    Args:
        torch_folder: Where torch is installed, with its headers.
        torch_version: Its version.
        folder: Where it is compiled to.

    Raises:
        BuildError: No compiler, the compiler failed, or the folder cannot be written.
    """
    return _cached(Target.ops(torch_folder, torch_version), folder)


def _cached(target: Target, folder: Path) -> Path:
    try:
        compiler = find_compiler()
    except BuildError:
        # One compiled while there was a compiler will do.
        names = folder.glob(_file_name(target.name, source_hash(), "*"))
        compiled = next(filter(_is_whole, sorted(names)), None)
        if compiled is None:
            raise
        return compiled
    version = hashlib.sha256("\n".join(_version(compiler)).encode()).hexdigest()
    library = folder / _file_name(target.name, source_hash(), version)
    if _is_whole(library):
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The kernel of the operating system drops the lock with the process, however that ends.
        with open(library.with_suffix(".lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(library):
                for leftover in folder.glob(_build_prefix(library) + "*"):  # of killed processes
                    shutil.rmtree(leftover, ignore_errors=True)
                logger.warning(
                    "compiling the moeq CPU kernel, %s, once: it takes some seconds", target.name
                )
                compile_library(target, library, compiler)
    except OSError as error:
        raise BuildError(
            f"the compiled kernel cannot be written to {folder}: {error}; set MOEQ_CACHE_DIR "
            "to another folder"
        ) from error
    return library


def compile_packaged() -> None:
    """Compile the kernel for all instruction sets to where :func:`packaged_library` looks.

    For the build of a wheel, in a copy of this package.

    Raises:
        BuildError: No compiler, the compiler failed, or it is not for x86-64.
    """
    if platform.machine() != "x86_64":
        raise BuildError(f"there is no CPU kernel for {platform.machine()}")
    compiler = find_compiler()
    PREBUILT.mkdir(exist_ok=True)
    for isa in INSTRUCTION_SETS:
        library = PREBUILT / _file_name(isa.name, source_hash())
        compile_library(Target.kernel(isa), library, compiler)


def compile_library(target: Target, library: Path, compiler: tuple[str, ...]) -> None:
    """Compile a target into ``library``, which appears complete or not at all.

    Raises:
        BuildError: The compiler failed; with its last messages.
    """
    prefix = _build_prefix(library)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=prefix) as folder:
        result = Path(folder, library.name)
        object_file = result.with_suffix(".o")
        source = str(SOURCES / target.source)
        _run(*compiler, *target.compile_flags, "-c", source, "-o", str(object_file))
        _run(*compiler, "-shared", str(object_file), *target.link_flags, "-o", str(result))
        # Loaders ignore what follows the sections.
        checksum = _checksum(result.read_bytes())
        with open(result, "ab") as file:
            file.write(checksum)
        os.replace(result, library)


def find_compiler() -> tuple[str, ...]:
    """Return the command of the C++ compiler: ``CXX``, else g++ or c++.

    clang only by ``CXX``: its code calls LLVM's OpenMP runtime, and torch brings GNU's.

    Raises:
        BuildError: There is none.
    """
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "c++"]:
        try:
            command = shlex.split(name)
        except ValueError as error:
            raise BuildError(f"CXX={name!r} is no command: {error}") from error
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
    digest = hashlib.sha256(repr((_KERNEL_FLAGS, _OPS_FLAGS, flags)).encode())
    for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _file_name(target: str, *keys: str) -> str:
    return "-".join(["moeq", target, *(key[:16] for key in keys)]) + ".so"


def _build_prefix(library: Path) -> str:
    """Return how the names of temporary folders start in which ``library`` is compiled."""
    return f".{library.stem}-"


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _is_whole(library: Path) -> bool:
    """Whether the file is as it was compiled; loading half a library could kill the process.

    A crash of the machine, or a copy of the cache that was cut short, can leave such a file.
    """
    try:
        content = library.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return _checksum(content[:-size]) == content[-size:]


def _version(compiler: tuple[str, ...]) -> tuple[str, ...]:
    return (*compiler, _run(*compiler, "--version"), platform.machine())


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            # Without translations: the version is part of the key of the cache.
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"`{shlex.join(command)}` failed: {error}") from error
    if done.returncode:
        messages = "\n".join(done.stderr.splitlines()[-10:])
        raise BuildError(f"`{shlex.join(command)}` failed ({done.returncode}):\n{messages}")
    return done.stdout
