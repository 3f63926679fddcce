"""How a fused MoE layer of vLLM holds and runs moeq experts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Parameter

from vllm_moeq.collectives import all_gather_rows, reduce_scatter_rows
from vllm_moeq.compat import (
    FusedMoEMethodBase,
    RoutedExperts,
    VocabParallelEmbedding,
    complete_cpu_communicator,
    init_logger,
    keep_out_of_lora,
    let_gpt_oss_load_packed_experts,
    local_slot,
    lora_is_enabled,
    set_weight_attrs,
    weights_are_dummies,
)
from vllm_moeq.expert_buffers import (
    WEIGHT_BUFFERS,
    ExpertBuffers,
    Kind,
    Shard,
    Share,
    check_hidden_size,
)
from vllm_moeq.format import FormatError, LayerBits
from vllm_moeq.kernels import (
    ACTIVATIONS,
    KERNELS,
    SWIGLU,
    ExpertLayout,
    ExpertWeights,
    fused_experts,
    select_kernel,
)
from vllm_moeq.linear import PACKED_COLUMNS

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own

_SWIGLU_OPTIONS = ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
_PREPARED = "moeq_prepared"
"""Attribute of parameters that a kernel has repacked: canonical offsets mean nothing in them."""


class MoeqMoEMethod(FusedMoEMethodBase):
    """Per-expert packed weights, one exact-size byte buffer for each projection.

    Args:
        moe: vLLM's description of the layer.
        bits: Widths of all experts of the layer, in global expert order.
        group_size: Weights of a row that share a scale.

    Raises:
        FormatError: Expert load balancing is on.
    """

    def __init__(self, moe: Any, bits: LayerBits, group_size: int) -> None:
        super().__init__(moe)
        if moe.moe_parallel_config.enable_eplb:
            raise FormatError(
                "expert load balancing moves experts into each other's places, which have one size "
                "for all; packed experts have a size each. Start without --enable-eplb"
            )
        if moe.moe_parallel_config.dp_size > 1:
            complete_cpu_communicator(all_gather_rows, reduce_scatter_rows)
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
        check_hidden_size(name, self.group_size, hidden_size)
        intermediate_size = intermediate_size_per_partition * moe.tp_size
        share = Share.of_rank(name, self.group_size, intermediate_size, moe.tp_rank, moe.tp_size)
        # Ask vLLM where each expert lives: expert placement may be linear or round robin.
        slots = {expert: local_slot(layer, expert) for expert in range(layer.global_num_experts)}
        self.local_experts = sorted((e for e in slots if slots[e] >= 0), key=slots.__getitem__)
        self.dummies = weights_are_dummies()
        self.buffers = ExpertBuffers(
            name,
            ExpertLayout.build(
                w13_bits=[self.bits.w13[expert] for expert in self.local_experts],
                w2_bits=[self.bits.w2[expert] for expert in self.local_experts],
                group_size=self.group_size,
                hidden_size=hidden_size,
                intermediate_size=share.size,
                gated=moe.is_act_and_mul,
            ),
            share,
            biased=moe.has_bias,
            alternating=_activation(layer) == "swigluoai",
        )
        for (projection, kind), tensor in self.buffers.allocate().items():
            parameter = Parameter(tensor, requires_grad=False)
            set_weight_attrs(
                parameter, {"weight_loader": _weight_loader(self.buffers, slots, kind)}
            )
            layer.register_parameter(f"{projection}_{kind}", parameter)
        if self.buffers.alternating:
            let_gpt_oss_load_packed_experts()
        if lora_is_enabled():
            keep_out_of_lora(_takes_no_adapter)

    def _check_supported(self, layer: RoutedExperts) -> None:
        """Refuse variants of experts that the kernels would compute wrongly without a word."""
        name, activation = layer.layer_name, _activation(layer)
        if activation not in ACTIVATIONS:
            raise FormatError(f"{name}: activation {activation!r} is not one of {ACTIVATIONS}")
        for option, value in zip(_SWIGLU_OPTIONS, _swiglu(layer), strict=True):
            if value is not None and activation not in SWIGLU:
                raise FormatError(f"{name}: the model sets {option} for activation {activation!r}")

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that every expert is filled, then repack once for the chosen kernel.

        Raises:
            FormatError: The checkpoint lacks tensors of local experts. vLLM itself does not check
                this for quantized models and would serve uninitialised memory.
            ValueError: ``MOEQ_KERNEL`` names a kernel that cannot run here.
        """
        missing = self.buffers.missing()
        # Dummy weights come from no checkpoint; one may still be loaded over them later.
        unfilled_on_purpose = self.dummies and self.buffers.untouched
        self.buffers.forget()
        if missing and not unfilled_on_purpose:
            kind, shard, slot = missing[0]
            raise FormatError(
                f"{layer.layer_name}: the checkpoint lacks {len(missing)} expert tensors, first "
                f"{shard}.{kind} of expert {self.local_experts[slot]}. Check it with `moeq verify`"
            )
        # Those of this load: when weights are loaded again, vLLM puts new parameters into the
        # layer and afterwards copies what is prepared here into the old ones.
        parameters = [getattr(layer, name) for name in WEIGHT_BUFFERS]
        kernel = select_kernel(parameters[0].device)
        logger.info_once("moeq experts run on the %s kernel", KERNELS[kernel].name)
        layout = replace(self.buffers.layout, kernel=kernel)
        weights = ExpertWeights(*parameters)
        prepared = KERNELS[kernel].prepare(weights, layout, _activation(layer))
        for parameter, tensor in zip(parameters, prepared, strict=True):
            parameter.data = tensor.data
            set_weight_attrs(parameter, {_PREPARED: True})
        # Host memory: the op reads it without waiting for the device.
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
            [getattr(layer, name) for name in WEIGHT_BUFFERS],
            getattr(layer, "w13_bias", None),
            getattr(layer, "w2_bias", None),
            layer.moeq_layout,
            layer.expert_map,
            _activation(layer),
            layer.apply_router_weight_on_input,
            *_swiglu(layer),
        )
        return result


def _weight_loader(
    buffers: ExpertBuffers, slots: dict[int, int], kind: Kind
) -> Callable[..., bool | None]:
    """Return the loader of a parameter; it fills whichever parameter vLLM hands it.

    It must not refer to the layer: vLLM keeps it in a table with layers as weak keys.
    """

    # vLLM's signature: most models call it by keyword, DeepSeek passes three by position.
    def load(
        param: Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: Any,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        if getattr(param, _PREPARED, False):
            raise FormatError(
                f"{buffers.name}: {weight_name} comes after loading has ended. Load weights again "
                "with vLLM's reload_weights, which gives the experts new buffers"
            )
        slot = slots[expert_id]
        local = slot >= 0
        if local:
            shard: Shard = shard_id
            name = f"expert {expert_id} {shard} {kind}"
            buffers.fill(param, kind, shard, slot, loaded_weight, name)
        return local if return_success else None

    return load


def _activation(layer: RoutedExperts) -> str:
    """Return the kernels' name of an activation; they go by the order of the rows of w13."""
    name: str = layer.activation.value
    return "silu" if name == "swigluoai_uninterleave" else name


def _swiglu(layer: RoutedExperts) -> list[float | None]:
    return [getattr(layer, option, None) for option in _SWIGLU_OPTIONS]


def _takes_no_adapter(module: torch.nn.Module) -> bool:
    if isinstance(module, VocabParallelEmbedding):  # vLLM looks for its `weight`
        return hasattr(module, PACKED_COLUMNS)
    experts = getattr(module, "routed_experts", None)
    return isinstance(getattr(experts, "quant_method", None), MoeqMoEMethod)
