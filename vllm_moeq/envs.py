"""The environment variables of the runtime: one table, and one function each that reads it.

They are read when they are needed, not when this module is imported. Standard library only.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable.

    Attributes:
        name: How it is called.
        values: What it may be; one description where it is free.
        default: What holds when it is unset.
        meaning: What it does.
    """

    name: str
    values: tuple[str, ...]
    default: str
    meaning: str


KERNEL = Variable(
    "MOEQ_KERNEL",
    ("auto", "cpu", "triton", "reference"),
    "auto",
    "the kernel; auto takes the fastest that can run",
)
CPU_ISA = Variable(
    "MOEQ_CPU_ISA",
    ("amx_int8", "avx512_vnni", "avx2", "portable"),
    "the best that the CPU has",
    "instruction set of the CPU kernel; portable is slow, for tests",
)
CPU_ACTIVATION = Variable(
    "MOEQ_CPU_ACTIVATION",
    ("int16", "int8"),
    "int16",
    "precision of activations inside the CPU kernel",
)
TILES = Variable(
    "MOEQ_TILES",
    ("a file",),
    "tiles-GPU.json in MOEQ_CACHE_DIR, if there is, else built-in tiles",
    "tiles of the Triton kernel, as moeq bench --tune writes them",
)
CACHE_DIR = Variable(
    "MOEQ_CACHE_DIR",
    ("a folder",),
    "moeq in XDG_CACHE_HOME, else ~/.cache/moeq",
    "where compiled kernels and measured tiles are kept",
)
VARIABLES = (KERNEL, CPU_ISA, CPU_ACTIVATION, TILES, CACHE_DIR)
"""All of them."""


def kernel() -> str:
    """Return the name of the kernel asked for, or ``auto``; the dispatch table knows the names."""
    return os.environ.get(KERNEL.name, KERNEL.default)


def cpu_isa() -> str | None:
    """Return the name of the instruction set asked for, None for the best."""
    return os.environ.get(CPU_ISA.name) or None


def cpu_activation() -> str:
    """Return the precision of activations inside the CPU kernel.

    Raises:
        ValueError: It is none of the values.
    """
    precision = os.environ.get(CPU_ACTIVATION.name) or CPU_ACTIVATION.default
    if precision not in CPU_ACTIVATION.values:
        raise ValueError(
            f"{CPU_ACTIVATION.name}={precision!r} is not one of {list(CPU_ACTIVATION.values)}"
        )
    return precision


def tiles() -> Path | None:
    """Return the file of tiles asked for, None for the one of this GPU in the cache."""
    chosen = os.environ.get(TILES.name)
    return Path(chosen) if chosen else None


def cache_dir() -> Path:
    """Return the absolute folder of what this machine compiled or measured; it need not exist.

    Raises:
        FileNotFoundError: No folder is named and there is no home folder.
    """
    chosen, parent = os.environ.get(CACHE_DIR.name), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(chosen or Path(parent or Path.home() / ".cache", "moeq"))
    except RuntimeError as error:  # no home
        raise FileNotFoundError(
            f"{error} Set {CACHE_DIR.name} to a folder that can be written"
        ) from error
    return folder.absolute()  # the loader looks for a bare name elsewhere
