"""Where models run."""

import torch

from moeq.errors import MoeqError


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
