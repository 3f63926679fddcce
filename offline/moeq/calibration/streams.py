"""Activations of the original model and of the rounded one, which run beside each other."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moeq.calibration.snapshots import Tensors
from moeq.model import LayerwiseModel
from moeq.model.activations import mapped


@dataclass(frozen=True, slots=True)
class Streams:
    """Residual streams of both models, and buffers for a layer: float32 [n, L, hidden_size].

    The system keeps them in memory, or in files when it needs the space.

    Attributes:
        hidden: Residual stream of the rounded model.
        original: That of the original model.
        sums: What the shares of the rounded model's experts are added to: ``hidden`` itself where
            the model adds up.
        original_sums: Likewise of the original model.
        residual_error: Sums of the original model less those of the rounded one.
        x: What the experts get.
    """

    hidden: torch.Tensor
    original: torch.Tensor
    sums: torch.Tensor
    original_sums: torch.Tensor
    residual_error: torch.Tensor
    x: torch.Tensor

    @classmethod
    def create(cls, model: LayerwiseModel, tokens: torch.Tensor, folder: Path) -> "Streams":
        """Make room for activations.

        Args:
            model: Whose.
            tokens: int64 [n, L]: the text.
            folder: Gets the files.

        Raises:
            OSError: The disk is full.
        """

        def buffer(name: str) -> torch.Tensor:
            return mapped(folder / f"{name}.bin", (*tokens.shape, model.hidden_size))

        hidden, original = buffer("hidden"), buffer("original")
        residual_error, x = buffer("residual-error"), buffer("x")
        if model.adds_up:
            sums, original_sums = hidden, original
        else:
            sums, original_sums = buffer("hidden-sums"), buffer("original-sums")
        return cls(hidden, original, sums, original_sums, residual_error, x)

    @property
    def between_layers(self) -> Tensors:
        """What the next layer gets, by name: all that a snapshot needs."""
        return {"hidden": self.hidden, "original": self.original}
