"""How a dense linear layer of vLLM holds and runs 4 or 8 bits on a CPU.

vLLM's compressed-tensors makes its parameters and loads them. On GPUs it also chooses among its own
kernels; on CPUs it is given ours.
"""

from typing import Any

import torch

from vllm_moeq.compat import init_logger, weights_are_dummies
from vllm_moeq.format import FormatError
from vllm_moeq.kernels import KERNELS, LinearLayout, LinearWeight, packed_linear, select_kernel

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own

PACKED_COLUMNS = "moeq_packed_columns"
"""Attribute of a layer of vLLM: names on disk of the packed weights that it is made of, and the
columns that those have."""


def prepare(layer: Any, bits: int, group_size: int) -> None:
    """Repack the parameters of a layer once for the chosen kernel.

    Args:
        layer: Has ``weight_packed`` and ``weight_scale``, loaded.
        bits: Width of a code.
        group_size: Weights of a row that share a scale.

    Raises:
        FormatError: Scales that `moeq quantize` would not write.
        ValueError: ``MOEQ_KERNEL`` names a kernel that cannot run here.
    """
    # Those of this load, see MoeqMoEMethod.
    parameters = [layer.weight_packed, layer.weight_scale]
    weight = LinearWeight(*(parameter.data for parameter in parameters))
    if not weights_are_dummies() and not weight.is_exact():
        raise FormatError(
            f"{', '.join(getattr(layer, PACKED_COLUMNS))}: float16 does not hold the scales "
            "exactly, as it does those of `moeq quantize`. Convert the model again"
        )
    kernel = select_kernel(weight.packed.device)
    logger.info_once("moeq linear layers run on the %s kernel", KERNELS[kernel].name)
    rows, groups = weight.scale.shape
    layout = LinearLayout(bits, group_size, rows, groups * group_size, kernel)
    layout.check()
    prepared = KERNELS[kernel].prepare_linear(weight, layout)
    for parameter, tensor in zip(parameters, prepared, strict=True):
        parameter.data = tensor
    layer.moeq_linear_outputs = rows
    # Host memory: the op reads it without waiting for the device.
    layer.register_buffer("moeq_linear_layout", layout.to_tensor(), persistent=False)


def run(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply tokens [..., K] with a layer that :func:`prepare` prepared."""
    result: torch.Tensor = packed_linear(
        x,
        layer.weight_packed,
        layer.weight_scale,
        bias,
        layer.moeq_linear_layout,
        layer.moeq_linear_outputs,
    )
    return result
