"""Where models run."""

from collections.abc import Sequence

import torch

from moeq.checkpoint import MoELayer
from moeq.errors import MoeqError
from moeq.model.cost import at_once
from moeq.workers import Workers, on_devices


def all_devices(device: torch.device) -> list[torch.device]:
    """Return what a device stands for: ``cuda`` without a number for every visible GPU."""
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def local_workers(layers: Sequence[MoELayer], *devices: torch.device) -> Workers:
    """Return who runs and rounds the experts of layers in this process."""
    return on_devices(devices, at_once(layers, devices[0]))


def torch_device(name: str) -> torch.device:
    """Return the CPU or a GPU that torch can use; ``auto`` is a CUDA GPU where there is one.

    Raises:
        MoeqError: There is no such device here, or it is neither; says why.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise MoeqError(f"`device` {name} cannot be used: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        raise MoeqError(f"`device` {name} cannot be used: give auto, cpu or cuda")
    return torch.device(name)
