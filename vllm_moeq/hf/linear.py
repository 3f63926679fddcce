"""Dense layers at 4 or 8 bits: packed in the place of ``nn.Linear`` and ``nn.Embedding``."""

from collections.abc import Callable

import torch
from torch.nn import Embedding, Linear, Module

from vllm_moeq.format import FormatError, linear_tensors
from vllm_moeq.hf.packed import OFFLOADED, ForwardOnly, NoWeight, refuse_to_move
from vllm_moeq.kernels import (
    KERNELS,
    LinearLayout,
    LinearWeight,
    linear_weight,
    look_up,
    packed_linear,
    select_kernel,
)


def layout_of(name: str, module: Module | None, bits: int, group_size: int) -> LinearLayout:
    """Describe a linear layer, or embeddings, packed.

    Raises:
        FormatError: Rows are not whole groups, or there is no such layer; names it.
    """
    # Another kind of embedding does more than to look up, as Gemma's, which scales.
    if not (isinstance(module, Linear) or type(module) is Embedding):
        raise FormatError(
            f"linear_bits names {name}, and this release of transformers holds no linear layer "
            "there, nor embeddings that are only looked up"
        )
    rows, columns = module.get_parameter("weight").shape
    layout = LinearLayout(bits, group_size, rows, columns)
    try:
        layout.check()
    except ValueError as error:
        raise FormatError(f"{name}: {error}. The plan belongs to another model") from error
    return layout


@torch.no_grad()
def dequantize(name: str, module: Module, layout: LinearLayout, weight: LinearWeight) -> None:
    """Fill a linear layer, or embeddings, with a packed weight.

    Raises:
        ValueError: The device map puts it on no device.
    """
    filled = module.get_parameter("weight")
    if filled.is_meta:
        raise ValueError(OFFLOADED.format(name=name))
    filled.copy_(linear_weight(weight, layout, torch.float32))


class _Packed(Module):
    """A packed layer in the place of another.

    Packed tensors are buffers that ``state_dict`` does not list, as those of ``PackedExperts``. One
    is called ``qweight``: peft looks for that name where there is no weight.
    """

    qweight: torch.Tensor
    scale: torch.Tensor

    def _hold(self, name: str, layout: LinearLayout, dtype: torch.dtype) -> None:
        self.name, self.sizes = name, layout
        # On the meta device: transformers moves them to where its device map says.
        for kind, (_, stored, shape) in zip(
            ("qweight", "scale"),
            linear_tensors(layout.rows, layout.columns, layout.bits, layout.group_size),
            strict=False,  # the shape itself is not held
        ):
            buffer = torch.empty(shape, dtype=stored, device="meta")
            self.register_buffer(kind, buffer, persistent=False)
        # A buffer, so that it changes with the type of the model.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def _on_device(self, weight: LinearWeight) -> LinearWeight:
        device = self.get_buffer("qweight").device
        if device.type == "meta":
            raise ValueError(OFFLOADED.format(name=self.name))
        return LinearWeight(*(tensor.to(device) for tensor in weight))

    def _keep(self, weight: LinearWeight) -> None:
        for kind, tensor in zip(("qweight", "scale"), weight, strict=True):
            self.register_buffer(kind, tensor, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Module:
        """Let a change of type reach the bias; refuse to move."""
        refuse_to_move(self.get_buffer("qweight").device, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]


class PackedLinear(_Packed, Linear):
    """A packed linear layer, with its bias.

    Args:
        name: For messages.
        linear: What it replaces.
        layout: Of :func:`layout_of`.
    """

    def __init__(self, name: str, linear: Linear, layout: LinearLayout) -> None:
        Module.__init__(self)  # nn.Linear's would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.layout = layout.to_tensor()  # no buffer: it stays on the CPU
        self._hold(name, layout, linear.weight.dtype)

    @property
    def weight(self) -> NoWeight:  # type: ignore[override]
        """No weight, which it says to what would read or change one, as peft merging an adapter."""
        return NoWeight(self.name, self.qweight.device, self.get_buffer("like").dtype)

    def fill(self, weight: LinearWeight) -> None:
        """Repack the canonical weight for the kernel of the device.

        Raises:
            ValueError: The device map puts the layer on no device, or ``MOEQ_KERNEL`` names a
                kernel that cannot run there.
        """
        there = self._on_device(weight)
        layout = self.sizes._replace(kernel=select_kernel(there.packed.device))
        self._keep(KERNELS[layout.kernel].prepare_linear(there, layout))
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


class PackedEmbedding(_Packed):
    """Packed embeddings: rows are dequantized as tokens look them up.

    No ``nn.Embedding``, whose weight transformers would initialize.

    Args:
        name: For messages.
        embedding: What it replaces.
        layout: Of :func:`layout_of`.
    """

    def __init__(self, name: str, embedding: Embedding, layout: LinearLayout) -> None:
        super().__init__()
        self._hold(name, layout, embedding.weight.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """No weight, but on its device and of its type, which is all that models ask of it."""
        return self.qweight.new_empty(0, dtype=self.get_buffer("like").dtype)

    def fill(self, weight: LinearWeight) -> None:
        """Keep the canonical weight.

        Raises:
            ValueError: The device map puts the layer on no device.
        """
        self._keep(self._on_device(weight))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of tokens [...]: [..., hidden_size]."""
        weight = LinearWeight(self.qweight, self.scale)
        return look_up(weight, self.sizes.bits, input, self.weight.dtype)


def packed_layer(name: str, module: Module, layout: LinearLayout) -> PackedLinear | PackedEmbedding:
    """Return what stands for a layer that :func:`layout_of` has described."""
    kind = PackedEmbedding if isinstance(module, Embedding) else PackedLinear
    return kind(name, module, layout)  # type: ignore[arg-type]
