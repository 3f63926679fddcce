"""``moeq bench``: times one fused MoE layer on this CPU, against vLLM's own kernel if wanted."""

from moeq.bench.contenders import (
    ACTIVATION,
    Contender,
    layouts,
    packed_contender,
    prepare,
    random_weights,
    vllm_contender,
)
from moeq.bench.machine import GB, Machine
from moeq.bench.report import Row, describe, mix_excess, rows
from moeq.bench.settings import SHAPES, Settings, Shape, UsageError, Widths
from moeq.bench.timing import Measurement, Round, measure

__all__ = [
    "ACTIVATION",
    "GB",
    "SHAPES",
    "Contender",
    "Machine",
    "Measurement",
    "Round",
    "Row",
    "Settings",
    "Shape",
    "UsageError",
    "Widths",
    "describe",
    "layouts",
    "measure",
    "mix_excess",
    "packed_contender",
    "prepare",
    "random_weights",
    "rows",
    "vllm_contender",
]
