"""Activations of all tokens: more than memory may hold."""

from pathlib import Path

import torch


def mapped(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Return float32 memory that the system may write to a file when it needs the space."""
    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)
