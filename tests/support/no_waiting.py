"""Tensors of a device that computes nothing: to see that the host never asks it for data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
"""Stands for the GPU: tensors have sizes and types, but no data."""
_DATA_DEPENDENT = {
    torch.Tag.data_dependent_output: "needs a value",
    torch.Tag.dynamic_output_shape: "has a result whose size depends on data",
}


class HostWaits(AssertionError):
    """An operation for which the host would have to wait, or that a CUDA graph cannot hold."""


@contextmanager
def no_waiting() -> Iterator[None]:
    """Refuse operations that read data of the device, or copy between it and the host."""
    with _NoConstants(), _NoWaiting():
        yield


class _NoConstants(TorchFunctionMode):
    """Refuses to make tensors of Python's numbers: of a GPU they would be copied to it."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Check one function, and call it."""
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and (
            result.device == DEVICE and not any(result is argument for argument in args)
        ):
            raise HostWaits(f"{func.__name__} copies numbers to the device")
        return result


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Check one operation, and run it."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device == DEVICE]
        if on_device:
            for tag, reason in _DATA_DEPENDENT.items():
                if tag in func.tags:
                    raise HostWaits(f"{func} {reason}")
            # One number of the host, as in x + 1, travels with the launch.
            if any(tensor.device != DEVICE and tensor.dim() for tensor in tensors):
                raise HostWaits(f"{func} takes tensors of the host and of the device")
            if any(isinstance(i, torch.Tensor) and _is_mask(i) for i in _indices(func, args)):
                raise HostWaits(f"{func} takes a mask, so that its size depends on data")
        target = (kwargs or {}).get("device")
        if tensors and target is not None:
            here = {tensor.device for tensor in tensors}
            if here != {torch.device(target)}:
                raise HostWaits(f"{func} copies from {here} to {target}")
        return func(*args, **(kwargs or {}))


def _is_mask(index: torch.Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _indices(func: Any, args: tuple[Any, ...]) -> Sequence[Any]:
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
        indices: Sequence[Any] = args[1]
        return indices
    return ()


class Launches:
    """Stands for a Triton kernel: notes how it is launched, computes nothing.

    Attributes:
        grids: That of each launch.
    """

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what launches the kernel on a grid."""
        assert all(type(size) is int and size > 0 for size in grid), grid

        def launch(*args: object, **kwargs: object) -> None:
            for tensor in (*args, *kwargs.values()):
                assert not isinstance(tensor, torch.Tensor) or tensor.device == DEVICE
            self.grids.append(grid)

        return launch
