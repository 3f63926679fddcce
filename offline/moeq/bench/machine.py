"""The machine that a benchmark runs on: its CPU, its caches, and how fast it reads memory."""

import ctypes
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from moeq.errors import MoeqError
from vllm_moeq import envs
from vllm_moeq.kernels import KERNELS, cpu, select_kernel
from vllm_moeq.kernels.cpu import library

GB = 1e9
_DEVICE = torch.device("cpu")
_CACHES = Path("/sys/devices/system/cpu")
_UNKNOWN_CACHE_BYTES = 64 << 20
_BUFFER_BYTES = 512 << 20
_FLUSHES = 4
"""A flush reads this many times the last-level caches: they do not evict strictly by age, so that
reading their size once or twice leaves a part of what was there."""
_READS = 5
"""Reads of one measurement of the bandwidth."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs the benchmark.

    Attributes:
        processor: Name of the CPU.
        cores: CPUs that this process may use.
        kernel: Index in the dispatch table of our fastest kernel, or of the one that
            ``MOEQ_KERNEL`` names.
        functions: The compiled CPU kernel, or None where it does not run.
        isa: Instruction set of the compiled CPU kernel, or why there is none.
    """

    processor: str
    cores: int
    kernel: int
    functions: ctypes.CDLL | None
    isa: str

    @classmethod
    def detect(cls) -> "Machine":
        """Describe this machine, compiling the CPU kernel if need be.

        Raises:
            MoeqError: An environment variable of the kernels has a wrong value; names it.
        """
        try:
            kernel = select_kernel(_DEVICE)
            problem = cpu.unavailable(_DEVICE)
            functions = None if problem else library.load()
        except ValueError as error:
            raise MoeqError(str(error)) from error
        if functions:
            isa = functions.moeq_isa().decode()
        else:  # a compiler's messages take many lines, which the kernel has logged
            isa = f"none: {str(problem).splitlines()[0]}"
        return cls(_processor(), len(os.sched_getaffinity(0)), kernel, functions, isa)

    @property
    def activations(self) -> str:
        """Precision of activations inside our kernel, as the environment asks for it now."""
        if KERNELS[self.kernel].run is not cpu.run:
            return "float32"
        return envs.cpu_activation()


class Memory:
    """Memory to read: in order to measure how fast that goes, or to empty the caches.

    Args:
        functions: The compiled CPU kernel, which reads fastest; None reads with torch.
    """

    def __init__(self, functions: ctypes.CDLL | None) -> None:
        self._functions = functions
        self._flush_bytes = _FLUSHES * last_level_cache_bytes()
        self._buffer = torch.empty(buffer_bytes() // 8, dtype=torch.int64)
        if functions:
            # As the weights of the kernel: small pages would make the figure too low.
            functions.moeq_use_huge_pages(self._buffer.data_ptr(), self._buffer.nbytes)
        self._buffer.fill_(1)  # pages never written would all be the same page of zeros

    @property
    def reader(self) -> str:
        """What reads."""
        return "the CPU kernel" if self._functions else "torch"

    def flush(self) -> None:
        """Replace what the caches hold.

        By reading: written lines would have to go back to memory during the timed call.
        """
        self._read(self._flush_bytes)

    def bandwidths(self) -> list[float]:
        """Read a large buffer some times, with all threads that torch uses; return GB/s of each."""
        rates = []
        for _ in range(_READS):
            start = time.perf_counter()
            self._read(self._buffer.nbytes)
            rates.append(self._buffer.nbytes / GB / (time.perf_counter() - start))
        return rates

    def _read(self, size: int) -> None:
        if self._functions:
            self._functions.moeq_read(self._buffer.data_ptr(), size)
        else:
            self._buffer[: size // 8].sum()


def buffer_bytes() -> int:
    """Return the size of what :class:`Memory` holds."""
    return max(_BUFFER_BYTES, _FLUSHES * last_level_cache_bytes())


def last_level_cache_bytes() -> int:
    """Return the size of all last-level caches together."""
    sizes = {}
    for folder in _CACHES.glob("cpu[0-9]*/cache/index3"):
        size = re.fullmatch(r"(\d+)K", (folder / "size").read_text().strip())
        if size:
            # A large CPU has several, each shared by some of the cores.
            sizes[(folder / "shared_cpu_list").read_text()] = int(size[1]) << 10
    return sum(sizes.values()) or _UNKNOWN_CACHE_BYTES


def available_bytes() -> int:
    """Return the memory that programs can still take without swapping."""
    match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    if not match:
        raise MoeqError("/proc/meminfo does not say how much memory is available")
    return int(match[1]) << 10


def _processor() -> str:
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()
