"""Every private part of vLLM that the plugin uses, in one place.

A release of vLLM that moves one of these breaks the import of this file only, and
:func:`vllm_moeq.register` turns that into one clear log line.
"""

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

__all__ = [
    "QUANTIZATION_METHODS",
    "FusedMoEMethodBase",
    "LinearBase",
    "QuantizationConfig",
    "RoutedExperts",
    "UnquantizedLinearMethod",
    "extract_layer_index",
    "init_logger",
    "local_slot",
    "model_path",
    "register_quantization_config",
    "set_weight_attrs",
    "weights_are_dummies",
]


def local_slot(layer: RoutedExperts, expert: int) -> int:
    """Return the local index of a global expert, or -1 if another rank holds it."""
    # Not ExpertMapManager.get_local_expert_ids(), which is gone in vLLM 0.33; this is what vLLM's
    # own weight loader calls in 0.25 to 0.33.
    return int(layer._map_global_expert_id_to_local_expert_id(expert))


def weights_are_dummies() -> bool:
    """Tell whether the model being built gets random weights (``--load-format dummy``)."""
    return bool(get_current_vllm_config().load_config.load_format == "dummy")


def model_path() -> str:
    """Return the path or hub id of the model being built."""
    return str(get_current_vllm_config().model_config.model)
