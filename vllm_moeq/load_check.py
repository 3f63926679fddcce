"""Nothing is served that is not there: loading must fill every parameter of a model.

vLLM skips its own check of missing tensors for quantized models and would serve uninitialised
memory. Its names of loaded tensors would not do: one parameter may be made of several tensors, as
those of q, k and v are, and a model need not return them. So weights begin as NaN, and a model that
still holds one after loading is refused.

That does not do for a reload, which repacks layer by layer and keeps the old weights of a layer
that got none. A reload must bring every tensor that filled the model at first.

Integers have no NaN. Tables, as that of DeepSeek-V4 from tokens to experts, begin as the lowest
number instead. The packed weights of a dense layer may be any number: they must be among the
tensors that come. Their scales, which take the same way into the layer, began as NaN.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import Module

from vllm_moeq.compat import VocabParallelEmbedding
from vllm_moeq.format import FormatError, first_few
from vllm_moeq.linear import PACKED_COLUMNS
from vllm_moeq.moe_method import MoeqMoEMethod

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = (torch.int32, torch.int64)
_BUFFERS = ("layer_scalar",)
"""Buffers that a checkpoint fills, of Gemma-4; others are computed, or are vLLM's own."""
_LOADED = "moeq_loaded_tensors"
"""Attribute of a model: the names of the tensors that filled it."""


@contextmanager
def must_fill(model: Module, predicts: bool) -> Iterator[None]:
    """Check that what runs inside loads a whole checkpoint.

    Args:
        model: Its parameters of 16 bits or more are overwritten on entry, but for packed weights;
            so are such buffers as a checkpoint fills.
        predicts: It is the prediction layer of another model, whose embeddings and head vLLM puts
            into it afterwards.

    Raises:
        FormatError: On exit, parameters are not or not wholly loaded.
    """
    for _, tensor in _checked_tensors(model, predicts):
        tensor.data.fill_(_unfilled(tensor))
    yield
    unfilled = [
        f"{name} ({missing} of {tensor.numel()})"
        for name, tensor in _checked_tensors(model, predicts)
        if (missing := _count_unfilled(tensor))
    ]
    if unfilled:
        raise FormatError(
            f"the checkpoint lacks weights, or holds NaN: {first_few(unfilled)}. "
            "Check it with `moeq verify`, or convert the model again"
        )


def must_bring_all(
    model: Module, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass on the tensors of a checkpoint, which must be at least those of the first one.

    Args:
        model: Remembers the names that it was loaded with.
        tensors: Names and tensors on their way to the model's ``load_weights``.

    Raises:
        FormatError: At the end, names of the first checkpoint are missing, or packed weights of
            dense layers; on the way, such a weight is not what the plan promises.
    """
    packed: dict[str, int] = {}
    for module in model.modules():
        packed |= getattr(module, PACKED_COLUMNS, {})
    names = set()
    for name, tensor in tensors:
        names.add(name)
        packed_name = f"{name}_packed" if name.endswith(".weight") else name
        if packed_name in packed:
            expected = (torch.int32, packed[packed_name])
            if name != packed_name or (tensor.dtype, tensor.shape[-1]) != expected:
                raise FormatError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {packed_name} in "
                    f"{expected[0]} with {expected[1]} columns: the checkpoint does not follow its "
                    "own bit plan, or, if weights are loaded again, it has another one than the "
                    "engine was started with"
                )
        yield name, tensor
    running = getattr(model, _LOADED, None)
    missing = sorted((running or packed.keys()) - names)
    if missing:
        which = "tensors that the running model was loaded with" if running else "packed weights"
        raise FormatError(
            f"the checkpoint lacks {which}: {first_few(missing)}. "
            f"{'Restart the engine; check' if running else 'Check'} the checkpoint with "
            "`moeq verify`"
        )
    setattr(model, _LOADED, names)


def _checked_tensors(model: Module, predicts: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), MoeqMoEMethod):
            continue  # knows which expert lacks what
        if predicts and isinstance(module, VocabParallelEmbedding):
            continue
        buffers = [
            (f"{prefix}.{name}", buffer)
            for name, buffer in module.named_buffers(recurse=False)
            if name in _BUFFERS
        ]
        for name, tensor in (*module.named_parameters(prefix, recurse=False), *buffers):
            packed = hasattr(module, PACKED_COLUMNS)
            dtypes = _FLOATS if packed else (*_FLOATS, *_INTEGERS)
            if tensor.dtype in dtypes and not tensor.is_meta:
                yield name, tensor


def _unfilled(tensor: torch.Tensor) -> float:
    return math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min


def _count_unfilled(tensor: torch.Tensor) -> int:
    if not tensor.is_floating_point():
        return int((tensor == _unfilled(tensor)).sum())
    # The sum needs no memory, but is no number either if weights are infinite.
    return int(tensor.isnan().sum()) if tensor.sum().isnan() else 0
