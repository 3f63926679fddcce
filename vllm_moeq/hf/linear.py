"""Dense linear layers at 4 or 8 bits: packed in the place of ``nn.Linear``."""

from collections.abc import Callable

import torch
from torch.nn import Linear, Module

from vllm_moeq.format import FormatError
from vllm_moeq.hf.packed import OFFLOADED, ForwardOnly, refuse_to_move
from vllm_moeq.kernels import (
    KERNELS,
    LinearLayout,
    LinearWeight,
    linear_weight,
    packed_linear,
    select_kernel,
)


def layout_of(name: str, linear: Linear, bits: int, group_size: int) -> LinearLayout:
    """Describe a linear layer packed.

    Raises:
        FormatError: Its rows are not whole groups.
    """
    layout = LinearLayout(bits, group_size, linear.out_features, linear.in_features)
    try:
        layout.check()
    except ValueError as error:
        raise FormatError(f"{name}: {error}. The plan belongs to another model") from error
    return layout


@torch.no_grad()
def dequantize(name: str, linear: Linear, layout: LinearLayout, weight: LinearWeight) -> None:
    """Fill a linear layer with a packed weight.

    Raises:
        ValueError: The device map puts it on no device.
    """
    if linear.weight.is_meta:
        raise ValueError(OFFLOADED.format(name=name))
    linear.weight.copy_(linear_weight(weight, layout, torch.float32))


class PackedLinear(Linear):
    """A packed layer in the place of another, with its bias; its ``weight`` is None.

    Packed tensors are buffers that ``state_dict`` does not list, as those of ``PackedExperts``. One
    is called ``qweight``: peft looks for that name where there is no weight.

    Args:
        name: For messages.
        linear: What it replaces.
        layout: Of :func:`layout_of`.
    """

    def __init__(self, name: str, linear: Linear, layout: LinearLayout) -> None:
        Module.__init__(self)  # nn.Linear's would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("weight", None)
        self.bias = linear.bias
        self.name = name
        self.sizes = layout
        self.layout = layout.to_tensor()  # no buffer: it stays on the CPU
        # On the meta device: transformers moves them to where its device map says.
        packed = (layout.rows, layout.columns * layout.bits // 32)
        scale = (layout.rows, layout.columns // layout.group_size)
        for kind, shape, dtype in (
            ("qweight", packed, torch.int32),
            ("scale", scale, torch.bfloat16),
        ):
            buffer = torch.empty(shape, dtype=dtype, device="meta")
            self.register_buffer(kind, buffer, persistent=False)

    def fill(self, weight: LinearWeight) -> None:
        """Repack the canonical weight for the kernel of the device.

        Raises:
            ValueError: The device map puts the layer on no device, or ``MOEQ_KERNEL`` names a
                kernel that cannot run there.
        """
        device = self.get_buffer("qweight").device
        if device.type == "meta":
            raise ValueError(OFFLOADED.format(name=self.name))
        layout = self.sizes._replace(kernel=select_kernel(device))
        there = LinearWeight(*(tensor.to(device) for tensor in weight))
        prepared = KERNELS[layout.kernel].prepare_linear(there, layout)
        for kind, tensor in zip(("qweight", "scale"), prepared, strict=True):
            self.register_buffer(kind, tensor, persistent=False)
        self.layout = layout.to_tensor()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features] for tokens [..., in_features]."""
        result: torch.Tensor = ForwardOnly.apply(self._run, input)  # type: ignore[no-untyped-call]
        return result

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = packed_linear(
            x, self.qweight, self.scale, self.bias, self.layout, self.out_features
        )
        return result

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Module:
        """Let a change of type reach the bias; refuse to move."""
        refuse_to_move(self.get_buffer("qweight").device, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]
