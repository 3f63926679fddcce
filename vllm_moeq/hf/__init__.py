"""Packed checkpoints in transformers: import this, and ``from_pretrained`` loads them.

Experts stay packed and run on the same kernels as in vLLM; ``MoeqConfig(dequantize=True)`` makes an
ordinary model of them instead.
"""

import transformers
from packaging.version import Version
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from vllm_moeq.format import QUANT_METHOD
from vllm_moeq.hf.config import MoeqConfig
from vllm_moeq.hf.quantizer import MoeqHfQuantizer

__all__ = ["MoeqConfig"]

if Version(transformers.__version__) < Version("5.19"):
    raise ImportError(
        f"vllm_moeq.hf needs transformers 5.19 or newer, and this is {transformers.__version__}"
    )
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a second import, after a reload
    register_quantization_config(QUANT_METHOD)(MoeqConfig)
    register_quantizer(QUANT_METHOD)(MoeqHfQuantizer)
