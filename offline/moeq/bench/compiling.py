"""Compiles Triton kernels in parallel, into Triton's cache on disk, where this process finds them.

The workers need no GPU: they are told for which one to compile.
"""

import logging
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from types import TracebackType
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


class Kernel(NamedTuple):
    """A kernel with all that its code depends on.

    Attributes:
        module: Where the function under ``triton.jit`` is.
        name: Its name.
        specialization: Types, constants and options, as Triton's ``preload`` takes them.
    """

    module: str
    name: str
    specialization: str


@contextmanager
def collected() -> Iterator[set[Kernel]]:
    """Give the set of kernels that launches in this context would compile.

    Nothing is compiled, and nothing is launched: not even what is compiled already, since what it
    reads has not been computed. Kernels run by Triton's interpreter are not for this context.
    """
    from triton import JITFunction, knobs  # type: ignore[import-untyped]

    kernels: set[Kernel] = set()

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernels.add(Kernel(fn.module, fn.name, compile["specialization_data"]))
        return True  # Triton leaves the compilation to us

    run = JITFunction.run

    def run_without_launch(self: Any, *arguments: Any, warmup: bool, **named: Any) -> Any:
        return run(self, *arguments, warmup=True, **named)

    hook = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook, JITFunction.run = note, run_without_launch
    try:
        yield kernels
    finally:
        knobs.runtime.jit_cache_hook, JITFunction.run = hook, run


class CompilerPool:
    """Processes that compile; they start with the first kernels, and end with the context."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None
        self._seen: set[Kernel] = set()

    def __enter__(self) -> "CompilerPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def compile(self, kernels: Iterable[Kernel], deadline: float = float("inf")) -> None:
        """Compile kernels that it has not seen, and wait for them.

        One that cannot be compiled is left to whoever launches it.

        Args:
            kernels: From :func:`collected`.
            deadline: Of ``time.monotonic``, after which it neither starts nor waits.
        """
        new = set(kernels) - self._seen
        if not new or time.monotonic() > deadline:
            return
        self._seen |= new
        if self._pool is None:
            from triton.runtime import driver  # type: ignore[import-untyped]

            self._pool = ProcessPoolExecutor(
                self._workers,
                mp_context=get_context("spawn"),  # CUDA does not survive a fork
                initializer=compile_for,
                initargs=(driver.active.get_current_target(),),
            )
        futures: list[Future[None]] = [self._pool.submit(_compile, kernel) for kernel in new]
        left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        done, _ = wait(futures, timeout=left)
        for future in done:
            if (error := future.exception()) is not None:
                logger.info("a kernel does not compile: %s", error)


class _Target:
    """Stands for Triton's driver where a target is all that is asked for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(target: Any) -> None:
    """Let this process compile for a GPU, Triton's ``GPUTarget``, without ever asking for one."""
    from triton.runtime import driver

    driver.set_active(_Target(target))


def _compile(kernel: Kernel) -> None:
    getattr(import_module(kernel.module), kernel.name).preload(kernel.specialization)
