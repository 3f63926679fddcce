"""Nothing is served that is not there: loading must fill every parameter of a model.

vLLM skips its own check of missing tensors for quantized models and would serve uninitialised
memory. Its names of loaded tensors would not do: one parameter may be made of several tensors, as
those of q, k and v are, and a model need not return them. So weights begin as NaN, and a model that
still holds one after loading is refused.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import Module, Parameter

from vllm_moeq.compat import VocabParallelEmbedding
from vllm_moeq.format import FormatError
from vllm_moeq.moe_method import MoeqMoEMethod

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NAMES_SHOWN = 5


@contextmanager
def must_fill(model: Module, predicts: bool) -> Iterator[None]:
    """Check that what runs inside loads a whole checkpoint.

    Args:
        model: Its parameters of 16 and 32 bits are overwritten on entry.
        predicts: It is the prediction layer of another model, whose embeddings and head vLLM puts
            into it afterwards.

    Raises:
        FormatError: On exit, parameters are not or not wholly loaded.
    """
    for _, parameter in _checked_parameters(model, predicts):
        parameter.data.fill_(math.nan)
    yield
    unfilled = [
        f"{name} ({missing} of {parameter.numel()})"
        for name, parameter in _checked_parameters(model, predicts)
        if (missing := _count_nan(parameter))
    ]
    if unfilled:
        shown, more = ", ".join(unfilled[:_NAMES_SHOWN]), len(unfilled) - _NAMES_SHOWN
        raise FormatError(
            "the checkpoint lacks weights, or holds NaN: "
            f"{shown}{f' and {more} more' if more > 0 else ''}. "
            "Check it with `moeq verify`, or convert the model again"
        )


def _checked_parameters(model: Module, predicts: bool) -> Iterator[tuple[str, Parameter]]:
    for prefix, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), MoeqMoEMethod):
            continue  # knows which expert lacks what
        if predicts and isinstance(module, VocabParallelEmbedding):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dtype in _DTYPES and not parameter.is_meta:
                yield name, parameter


def _count_nan(parameter: Parameter) -> int:
    # The sum needs no memory, but is no number either if weights are infinite.
    return int(parameter.isnan().sum()) if parameter.sum().isnan() else 0
