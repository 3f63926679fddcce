"""Layers that a moeq checkpoint leaves in 16 bits: loading must fill them, all of them.

vLLM skips its own check of missing tensors for quantized models and would serve uninitialised
memory. So weights begin as NaN, and a layer that still holds one after loading is refused.
"""

import math
from typing import Any, TypeVar

import torch

from vllm_moeq.compat import QuantizeMethodBase
from vllm_moeq.format import FormatError

Method = TypeVar("Method", bound=QuantizeMethodBase)


def checked(method: Method, name: str) -> Method:
    """Let vLLM's method for one unquantized layer check what has been loaded.

    Its class stays the same: vLLM chooses loaders by the names of classes.

    Args:
        method: A new instance; it is changed.
        name: Name of the layer for messages.

    Returns:
        The method. After loading it raises FormatError if the checkpoint lacks weights.
    """
    create, process = method.create_weights, method.process_weights_after_loading

    def create_weights(layer: torch.nn.Module, *arguments: Any, **attributes: Any) -> None:
        create(layer, *arguments, **attributes)
        for parameter in layer.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data.fill_(math.nan)

    def process_weights_after_loading(layer: torch.nn.Module) -> None:
        for kind, parameter in layer.named_parameters(recurse=False):
            _check_filled(f"{name}.{kind}", parameter)
        process(layer)

    vars(method).update(
        create_weights=create_weights,
        process_weights_after_loading=process_weights_after_loading,
    )
    return method


def _check_filled(name: str, parameter: torch.Tensor) -> None:
    # The sum needs no memory, but is no number either if weights are infinite.
    if parameter.is_meta or not parameter.is_floating_point() or not parameter.sum().isnan():
        return
    missing = int(parameter.isnan().sum())
    if missing:
        raise FormatError(
            f"{name}: {missing} of {parameter.numel()} weights are no numbers: the checkpoint "
            "lacks them, or holds NaN. Check it with `moeq verify`, or convert the model again"
        )
