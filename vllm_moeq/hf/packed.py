"""What packed modules have in common: they only run forward, and stay where they were prepared."""

from collections.abc import Callable
from typing import Any

import torch

OFFLOADED = (
    "{name}: packed weights cannot be offloaded; give `device_map` enough memory, or the CPU alone"
)


class NoWeight:
    """Stands for a packed weight: all that can be asked of it is its device and type.

    Args:
        name: Of the layer.
        device: Where it is.
        dtype: Of the weight if it were not packed.
    """

    _is_hf_initialized = True  # transformers leaves such weights as they are

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.device, self.dtype = name, device, dtype

    def __getattr__(self, name: str) -> Any:
        """Refuse.

        Raises:
            AttributeError: Always.
        """
        if name == "name" or name.startswith("__"):  # of one that copy makes without __init__
            raise AttributeError(name)
        raise AttributeError(
            f"{self.name} is packed and has no weight that can be read or changed (`{name}`): to "
            "merge an adapter, load the model with "
            "`quantization_config=MoeqConfig(dequantize=True)`"
        )


class ForwardOnly(torch.autograd.Function):
    """Without it autograd would take an op for a constant, and lower layers would not train."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """Call ``run`` with the tensors."""
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Refuse.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "packed weights have no backward pass: to train, load the model with "
            "`quantization_config=MoeqConfig(dequantize=True)`"
        )


def refuse_to_move(here: torch.device, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Check that what ``Module._apply`` is to do moves nothing.

    Raises:
        RuntimeError: It does.
    """
    there = fn(torch.empty(0, dtype=torch.uint8, device=here)).device
    if there != here:
        raise RuntimeError(
            f"packed weights are prepared for {here} and cannot move to {there}: load the model "
            f'there with `device_map="{there}"`'
        )
