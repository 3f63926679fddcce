"""``moeq bench``: times one fused MoE layer on this CPU, against vLLM's own kernel if wanted."""

from moeq.bench.contenders import Contender, packed_contender, prepare, vllm_contender
from moeq.bench.machine import Machine
from moeq.bench.report import Row, describe, mix_excess, rows
from moeq.bench.settings import SHAPES, Settings, Shape, UsageError, Widths
from moeq.bench.timing import Measurement, Round, measure

__all__ = [
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
    "measure",
    "mix_excess",
    "packed_contender",
    "prepare",
    "rows",
    "vllm_contender",
]
