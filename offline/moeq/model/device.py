"""Where models run."""

import torch

from moeq.errors import MoeqError


def all_devices(device: torch.device) -> list[torch.device]:
    """Return what a device stands for: ``cuda`` without a number for every visible GPU."""
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def torch_device(name: str) -> torch.device:
    """Return a device that torch can use; ``auto`` is a CUDA GPU where there is one.

    Raises:
        MoeqError: There is no such device here; says why.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise MoeqError(f"`device` {name} cannot be used: {reason}") from error
    return torch.device(name)
