"""Activations of all tokens: more than memory may hold."""

import os
from pathlib import Path

import torch

from moeq.checkpoint.disk_errors import named_in_errors


def mapped(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Return float32 memory that the system may write to a file when it needs the space.

    Raises:
        OSError: The disk is full.
    """
    size = torch.Size(shape).numel()
    # All of it at once: a disk that filled up later would kill the process (SIGBUS).
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with named_in_errors(path):
            os.posix_fallocate(descriptor, 0, 4 * size)
    finally:
        os.close(descriptor)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)
