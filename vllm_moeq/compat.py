"""Every private part of vLLM that the plugin uses, in one place.

A release of vLLM that moves one of these breaks the import of this file only, and
:func:`vllm_moeq.register` turns that into one clear log line.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from vllm import __version__ as vllm_version
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import (
    FusedMoEMethodBase,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import base_loader
from vllm.model_executor.model_loader import utils as model_loader_utils
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

__all__ = [
    "QUANTIZATION_METHODS",
    "CpuFusedMoE",
    "FusedMoEMethodBase",
    "LinearBase",
    "ParallelLMHead",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "RoutedExperts",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
    "VocabParallelEmbedding",
    "change_new_models",
    "complete_cpu_communicator",
    "compressed_tensors_method",
    "cpu_fused_moe_bf16",
    "extract_layer_index",
    "guard_loading",
    "init_logger",
    "keep_out_of_lora",
    "let_gpt_oss_load_packed_experts",
    "local_slot",
    "lora_is_enabled",
    "model_path",
    "num_hidden_layers",
    "register_quantization_config",
    "run_linear_layers_on_cpus",
    "set_embedding_method",
    "set_weight_attrs",
    "weights_are_dummies",
]

_EXPERT_OF_GPT_OSS = re.compile(
    r"(?P<experts>.*\.mlp\.experts)\.(?P<expert>\d+)\."
    r"(?P<matrix>gate_proj\.|up_proj\.|down_proj\.|w2_)"
    r"(?P<kind>weight_packed|weight_scale|weight_zero_point|bias)"
)
"""A packed tensor; vLLM has renamed some of those of down_proj before it asks."""
Change = Callable[[Any, torch.nn.Module], bool]
Guard = Callable[[torch.nn.Module, bool], AbstractContextManager[None]]
RowExchange = Callable[[torch.Tensor, Sequence[int], torch.distributed.ProcessGroup], torch.Tensor]
Tensors = Iterable[tuple[str, torch.Tensor]]
Watch = Callable[[torch.nn.Module, Tensors], Iterator[tuple[str, torch.Tensor]]]


def local_slot(layer: RoutedExperts, expert: int) -> int:
    """Return the local index of a global expert, or -1 if another rank holds it."""
    # Not ExpertMapManager.get_local_expert_ids(), which is gone in vLLM 0.33; this is what vLLM's
    # own weight loader calls in 0.25 to 0.33.
    return int(layer._map_global_expert_id_to_local_expert_id(expert))


def compressed_tensors_method(layer: torch.nn.Module, prefix: str, config: dict[str, Any]) -> Any:
    """Return the method by which vLLM's compressed-tensors runs a layer.

    Args:
        layer: A linear layer or an output head.
        prefix: Its name, which is the target in the config.
        config: Of compressed-tensors.
    """
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    return CompressedTensorsConfig.from_config(config).get_quant_method(layer, prefix)


@cache
def run_linear_layers_on_cpus(
    quantization: str,
    prepare: Callable[[torch.nn.Module, int, int], None],
    run: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> None:
    """Let compressed-tensors run symmetric integers on CPUs by functions of ours.

    Args:
        quantization: Only models with this ``--quantization``.
        prepare: Takes a loaded layer, its width and its group size, and repacks its parameters.
        run: Takes a prepared layer, tokens and a bias, and returns the outputs.
    """
    from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
    from vllm.model_executor.kernels.linear.mixed_precision import MPLinearKernel
    from vllm.platforms.interface import PlatformEnum
    from vllm.scalar_type import scalar_types

    widths = {scalar_types.uint4b8: 4, scalar_types.uint8b128: 8}

    class MoeqLinearKernel(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            if get_current_vllm_config().model_config.quantization != quantization:
                return False, f"it is for models with --quantization {quantization}"
            return c.weight_type in widths and not c.zero_points, "the integers are not symmetric"

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            prepare(layer, widths[self.config.weight_type], self.config.group_size)

        def apply_weights(
            self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            return run(layer, x, bias)

    _POSSIBLE_KERNELS[PlatformEnum.CPU].insert(0, MoeqLinearKernel)


def lora_is_enabled() -> bool:
    """Tell whether the model being built is to serve LoRA adapters."""
    return get_current_vllm_config().lora_config is not None


def keep_out_of_lora(is_excluded: Callable[[torch.nn.Module], bool]) -> None:
    """Let vLLM put LoRA on every layer of a model but some.

    vLLM wraps all fused experts and embeddings as soon as LoRA is enabled, whatever an adapter
    holds, and only its own kernels of experts and a plain weight can be wrapped. Modules
    left out of its list stay as they are, and it refuses an adapter that has weights for them
    before it takes anything from it.

    Args:
        is_excluded: Says for a module of the model whether it is one of those.
    """
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    class Manager(LRUCacheLoRAModelManager):
        supported_lora_modules: list[str]

        def _create_lora_modules(self) -> None:
            excluded = {
                name.rpartition(".")[2]
                for name, module in self.model.named_modules()
                if is_excluded(module)
            }
            targets = set(self.lora_config.target_modules or ()) & excluded
            if targets:
                raise ValueError(
                    f"lora_target_modules names {sorted(targets)}, but LoRA on moeq experts is not "
                    "supported, nor on packed embeddings; name only other layers"
                )
            self.supported_lora_modules = [
                name for name in self.supported_lora_modules if name not in excluded
            ]
            super()._create_lora_modules()

    LRUCacheWorkerLoRAManager._manager_cls = Manager


def set_embedding_method(layer: VocabParallelEmbedding, method: Any) -> None:
    """Give embeddings, or an output head, that are built but not loaded, another method."""
    weight = layer.weight
    layer.register_parameter("weight", None)
    layer.quant_method = method
    layer.use_fused_embedding = False  # whose kernel reads the weight itself
    with weight.device:
        method.create_weights(
            layer,
            layer.embedding_dim,
            [len(weight)],
            layer.embedding_dim,
            layer.num_embeddings_padded,
            params_dtype=weight.dtype,
            weight_loader=layer.weight_loader,
        )
    layer.update_param_tp_status()


def change_new_models(quantization: str, change: Change) -> None:
    """Let models of one ``--quantization`` be changed as soon as they are built.

    Args:
        quantization: Models of any other are left alone.
        change: Gets the quantization config and the model; says whether it has changed it.
    """
    build = base_loader.initialize_model

    @wraps(build)
    def initialize_model(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model: torch.nn.Module = build(*args, **kwargs)
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        config = vllm_config.quant_config
        if config is not None and config.get_name() == quantization:
            with set_current_vllm_config(vllm_config):
                changed = change(config, model)
            # vLLM has noted what a reload has to restore. In older releases it does not.
            if changed and hasattr(model_loader_utils, "record_metadata_for_reloading"):
                model_loader_utils.record_metadata_for_reloading(model)
        return model

    base_loader.initialize_model = initialize_model


def guard_loading(quantization: str, guard: Guard, watch: Watch) -> None:
    """Let vLLM load checkpoints of one ``--quantization`` only under guard.

    Weights that come otherwise are left alone: dummies, states that vLLM saved and checks itself,
    and tensors that are handed to a running model.

    Args:
        quantization: Models of any other are left alone.
        guard: Makes the context for a model that is built but not loaded, given whether it is the
            prediction layer of another.
        watch: Passes on the tensors of a checkpoint, those of a later reload too.
    """
    for loader in (DefaultModelLoader, RunaiModelStreamerLoader):
        loader.load_weights = _guarded(loader.load_weights, quantization, guard)
        if hasattr(loader, "get_all_weights"):  # in older releases one of them has none
            loader.get_all_weights = _watched(loader.get_all_weights, quantization, watch)


def _guarded(load: Callable[..., None], quantization: str, guard: Guard) -> Callable[..., None]:
    @wraps(load)
    def load_weights(self: Any, model: torch.nn.Module, model_config: Any) -> None:
        # Also of a layer that drafts tokens: it has a config of its own, to which vLLM adds this.
        predicts = getattr(model_config.hf_config, "n_predict", None) is not None
        guarded = model_config.quantization == quantization
        with guard(model, predicts) if guarded else nullcontext():
            load(self, model, model_config)

    return load_weights


def _watched(
    read: Callable[..., Tensors], quantization: str, watch: Watch
) -> Callable[..., Tensors]:
    @wraps(read)
    def get_all_weights(self: Any, model_config: Any, model: torch.nn.Module) -> Tensors:
        tensors = read(self, model_config, model)
        return watch(model, tensors) if model_config.quantization == quantization else tensors

    return get_all_weights


def weights_are_dummies() -> bool:
    """Tell whether the model being built gets random weights (``--load-format dummy``)."""
    return bool(get_current_vllm_config().load_config.load_format == "dummy")


def num_hidden_layers() -> int:
    """Return the decoder layers of the model being built, without those that only draft tokens."""
    return int(get_current_vllm_config().model_config.hf_text_config.num_hidden_layers)


def model_path() -> str:
    """Return the path or hub id of the model being built."""
    return str(get_current_vllm_config().model_config.model)


def let_gpt_oss_load_packed_experts() -> None:
    """Let vLLM's gpt-oss load the matrices of an expert by the names that its other models take.

    The others ask the layer which matrix a tensor is; this one goes by a list of suffixes.
    """
    from vllm.model_executor.models.gpt_oss import GptOssModel

    of_vllm = GptOssModel._get_streamed_expert_info
    if getattr(of_vllm, "__module__", None) == __name__:
        return  # replaced already

    def expert_info(name: str, params: dict[str, Any]) -> tuple[int, str, str] | None:
        match = _EXPERT_OF_GPT_OSS.fullmatch(name)
        if match is None:
            info: tuple[int, str, str] | None = of_vllm(name, params)
            return info
        shard = {"gate_proj.": "w1", "up_proj.": "w3"}.get(match["matrix"], "w2")
        projection = "w2" if shard == "w2" else "w13"
        parameter = f"{match['experts']}.routed_experts.{projection}_{match['kind']}"
        return int(match["expert"]), parameter, shard

    GptOssModel._get_streamed_expert_info = staticmethod(expert_info)


def complete_cpu_communicator(all_gather: RowExchange, reduce_scatter: RowExchange) -> None:
    """Give vLLM's communicator for CPUs what data parallelism of experts needs, if it lacks it.

    Args:
        all_gather: Takes rows, the number of rows of each rank, and the group of these ranks; see
            :func:`vllm_moeq.collectives.all_gather_rows`.
        reduce_scatter: Likewise :func:`vllm_moeq.collectives.reduce_scatter_rows`.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed.device_communicators.base_device_communicator import (
        DeviceCommunicatorBase,
    )
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def all_gatherv(
        self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(input_, list):
            return [self.all_gatherv(tensor, dim, sizes) for tensor in input_]
        return all_gather(input_, _rows(dim, sizes), self.device_group)

    def reduce_scatterv(
        self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        return reduce_scatter(input_, _rows(dim, sizes), self.device_group)

    for method in (all_gatherv, reduce_scatterv):
        name = method.__name__
        if getattr(CpuCommunicator, name) is getattr(DeviceCommunicatorBase, name):
            setattr(CpuCommunicator, name, method)


def _rows(dim: int, sizes: list[int] | None) -> list[int]:
    # All that vLLM's exchange of tokens between ranks asks for.
    if dim != 0 or sizes is None:
        raise NotImplementedError(f"dim {dim}, sizes {sizes}: only rows, as many as sizes say")
    return sizes


class CpuFusedMoE(NamedTuple):
    """vLLM's own experts on a CPU; ``run`` takes tokens, router weights and int32 expert ids."""

    detail: str
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cpu_fused_moe_bf16(w13: torch.Tensor, w2: torch.Tensor) -> CpuFusedMoE:
    """Prepare vLLM's own kernel for bfloat16 experts with SiLU, to compare ours with it.

    Args:
        w13: [E, 2 * intermediate_size, hidden_size], both sizes multiples of 32.
        w2: [E, hidden_size, intermediate_size].

    Raises:
        ImportError: This vLLM was not built for CPUs.
    """
    from vllm import _custom_ops as ops

    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        raise ImportError(f"vLLM {vllm_version} was not built for CPUs")
    # The choice of vLLM's own CPU experts, for sizes that fit both.
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    first, second = (ops.cpu_prepack_moe_weight(weight, isa) for weight in (w13, w2))

    def run(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        ops.cpu_fused_moe(
            out, x, first, second, None, None, topk_weights, topk_ids, "silu", isa, False
        )
        return out

    return CpuFusedMoE(f"vllm {vllm_version}, bfloat16, its {isa} kernel", run)
