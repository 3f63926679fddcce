"""Reads safetensors files of any size without keeping what has been read in memory."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock, current_thread, main_thread
from typing import Any

import torch
from safetensors import safe_open

Index = tuple[int | slice, ...]
"""Selects a part of a tensor, as in ``tensor[index]``."""
_MOST_MAPPED = 1 << 24
"""Bytes read from files before they are closed. A tensor's pages count as the process's memory
until then, even after the tensor is gone."""


class MappedFiles:
    """Opens files when their tensors are read, and closes them now and then.

    Tensors that are in use keep their file open; all others leave memory. Threads may share it.
    """

    def __init__(self) -> None:
        self._handles: dict[Path, Any] = {}
        self._read = 0
        self._lock = RLock()

    def open(self, path: Path) -> Any:
        """Return the safetensors handle of a file; not to be kept.

        Raises:
            OSError, SafetensorError: It is missing or damaged.
        """
        with self._lock:
            if self._read > _MOST_MAPPED:
                self._handles.clear()
                self._read = 0
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="pt")
            return self._handles[path]

    def tensor(self, path: Path, name: str, index: Index | None = None) -> torch.Tensor:
        """Return one tensor of a file that has it, or the part that an index selects.

        Raises:
            OSError, SafetensorError: As :meth:`open`.
        """
        with self._lock:
            with _uninterrupted():
                handle = self.open(path)
                tensor: torch.Tensor = (
                    _selected(handle.get_slice(name), index) if index else handle.get_tensor(name)
                )
            self._read += tensor.nbytes
        return tensor


def _selected(stored: Any, index: Index) -> torch.Tensor:
    """Return a part of a tensor; safetensors knows no steps, so what they skip is read as well."""
    read = tuple(slice(None) if isinstance(i, slice) and i.step else i for i in index)
    steps = tuple(i if i.step else slice(None) for i in index if isinstance(i, slice))
    tensor: torch.Tensor = stored[read]
    return tensor[steps]


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C: inside safetensors it is lost, or turns into an error about shapes."""
    if current_thread() is not main_thread():  # never interrupted
        yield
        return
    pending: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *arguments: pending.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending and callable(previous):
        previous(*pending[0])
