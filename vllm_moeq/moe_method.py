"""How a fused MoE layer of vLLM holds and runs moeq experts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Parameter

from vllm_moeq.compat import (
    FusedMoEMethodBase,
    RoutedExperts,
    init_logger,
    local_slot,
    set_weight_attrs,
    weights_are_dummies,
)
from vllm_moeq.expert_buffers import KINDS, ExpertBuffers, Kind, check_group_fits
from vllm_moeq.format import FormatError, LayerBits
from vllm_moeq.kernels import ACTIVATIONS, KERNELS, ExpertLayout, fused_experts, select_kernel

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own


class MoeqMoEMethod(FusedMoEMethodBase):
    """Per-expert packed weights, one exact-size byte buffer for each projection.

    Args:
        moe: vLLM's description of the layer.
        bits: Widths of all experts of the layer, in global expert order.
        group_size: Weights of a row that share a scale.
    """

    def __init__(self, moe: Any, bits: LayerBits, group_size: int) -> None:
        super().__init__(moe)
        self.bits = bits
        self.group_size = group_size

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """Return None: vLLM's own MoE kernels are not used."""
        return None

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the packed buffers on ``layer``.

        Raises:
            FormatError: The plan or its group size does not fit the model or its parallelism.
        """
        moe, name = self.moe, layer.layer_name
        if self.bits.num_experts != moe.num_logical_experts:
            raise FormatError(
                f"{name}: expert_bits lists {self.bits.num_experts} experts, the model has "
                f"{moe.num_logical_experts}. The plan belongs to another model"
            )
        self._check_supported(layer)
        if hidden_size != moe.hidden_dim_unpadded:
            raise FormatError(
                f"{name}: the chosen all-to-all backend pads hidden_size {moe.hidden_dim_unpadded} "
                f"to {hidden_size}, which packed experts cannot follow; choose another backend"
            )
        check_group_fits(
            name,
            self.group_size,
            hidden_size,
            intermediate_size_per_partition * moe.tp_size,
            moe.tp_size,
        )
        # Ask vLLM where each expert lives: expert placement may be linear or round robin.
        slots = {local_slot(layer, expert): expert for expert in range(layer.global_num_experts)}
        self.local_experts = [slots[slot] for slot in range(num_experts)]
        self.buffers = ExpertBuffers(
            name,
            ExpertLayout.build(
                w13_bits=[self.bits.w13[expert] for expert in self.local_experts],
                w2_bits=[self.bits.w2[expert] for expert in self.local_experts],
                group_size=self.group_size,
                hidden_size=hidden_size,
                intermediate_size=intermediate_size_per_partition,
                gated=moe.is_act_and_mul,
            ),
            tp_rank=moe.tp_rank,
            tp_size=moe.tp_size,
        )
        for tensor_name, tensor in self.buffers.tensors.items():
            parameter = Parameter(tensor, requires_grad=False)
            kind = next(kind for kind in KINDS if tensor_name.endswith(kind))
            set_weight_attrs(parameter, {"weight_loader": self._weight_loader(layer, kind)})
            layer.register_parameter(tensor_name, parameter)
            self.buffers.tensors[tensor_name] = parameter

    def _check_supported(self, layer: RoutedExperts) -> None:
        """Refuse variants of experts that the kernels would compute wrongly without a word."""
        name, activation = layer.layer_name, layer.activation.value
        if self.moe.has_bias:
            raise FormatError(f"{name}: experts with biases are not supported yet")
        if activation not in ACTIVATIONS:
            raise FormatError(f"{name}: activation {activation!r} is not one of {ACTIVATIONS}")
        for option in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"):
            if getattr(layer, option, None) is not None:
                raise FormatError(f"{name}: the model sets {option}, which is not supported yet")

    def _weight_loader(self, layer: RoutedExperts, kind: Kind) -> Callable[..., bool | None]:
        buffers = self.buffers

        # vLLM's signature: most models call it by keyword, DeepSeek passes three by position.
        def load(
            param: Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: Any,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            slot = local_slot(layer, expert_id)
            local = slot >= 0
            if local:
                name = f"expert {expert_id} {shard_id} {kind}"
                buffers.fill(kind, shard_id, slot, loaded_weight, name)
            return local if return_success else None

        return load

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that every expert is filled, then repack once for the chosen kernel.

        Raises:
            FormatError: The checkpoint lacks tensors of local experts. vLLM itself does not check
                this for quantized models and would serve uninitialised memory.
            ValueError: ``MOEQ_KERNEL`` names a kernel that cannot run here.
        """
        missing = [] if weights_are_dummies() else self.buffers.missing()
        if missing:
            kind, shard, slot = missing[0]
            raise FormatError(
                f"{layer.layer_name}: the checkpoint lacks {len(missing)} expert tensors, first "
                f"{shard}.{kind} of expert {self.local_experts[slot]}. Check it with `moeq verify`"
            )
        weights = self.buffers.close()
        kernel = select_kernel(weights.w13_packed.device)
        logger.info_once("moeq experts run on the %s kernel", KERNELS[kernel].name)
        # Host memory: the op reads it without waiting for the device.
        layout = replace(self.buffers.layout, kernel=kernel)
        prepared = KERNELS[kernel].prepare(weights, layout, layer.activation.value)
        for parameter, tensor in zip(weights, prepared, strict=True):
            parameter.data = tensor.data
        layer.register_buffer("moeq_layout", layout.to_tensor(), persistent=False)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the routed experts; vLLM's runner adds shared experts and the all-reduce."""
        result: torch.Tensor = fused_experts(
            x,
            topk_weights,
            topk_ids,
            [
                layer.w13_weight_packed,
                layer.w13_weight_scale,
                layer.w13_weight_zero_point,
                layer.w2_weight_packed,
                layer.w2_weight_scale,
                layer.w2_weight_zero_point,
            ],
            None,
            None,
            layer.moeq_layout,
            layer.expert_map,
            layer.activation.value,
            layer.apply_router_weight_on_input,
        )
        return result
