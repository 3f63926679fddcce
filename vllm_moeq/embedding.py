"""How vLLM holds token embeddings of 4 or 8 bits: rows are dequantized as tokens look them up."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

from vllm_moeq.compat import QuantizeMethodBase, set_weight_attrs
from vllm_moeq.format import linear_tensors
from vllm_moeq.kernels import LinearWeight, look_up


class MoeqEmbeddingMethod(QuantizeMethodBase):
    """Runs embeddings of one width on every device, in torch.

    vLLM's compressed-tensors has such a method, too, but for GPUs alone.

    Args:
        bits: Width of a code.
        group_size: Weights of a row that share a scale.
    """

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        **_: Any,
    ) -> None:
        """Make the parameters that take the tensors of the checkpoint; vLLM splits their rows."""
        layer.moeq_dtype = params_dtype
        rows = sum(output_partition_sizes)
        tensors = linear_tensors(rows, input_size, self.bits, self.group_size)
        for name, dtype, shape in tensors:
            parameter = Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            split = {"output_dim": 0} if len(shape) == 2 else {}
            set_weight_attrs(parameter, {"weight_loader": weight_loader, **split})
            layer.register_parameter(name, parameter)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Return the rows of tokens [...]: [..., hidden_size]."""
        weight = LinearWeight(layer.weight_packed, layer.weight_scale)
        return look_up(weight, self.bits, input_, layer.moeq_dtype)

    def apply(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Refuse: an output head has a method of linear layers.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("packed token embeddings are only looked up")
