"""The offline step of vllm-moeq: reads a checkpoint, decides a bit plan, quantizes and packs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeq.api import compare, evaluate, inspect, plan, quantize, verify
from moeq.errors import MoeqError
from moeq.progress import Progress

if TYPE_CHECKING:
    from moeq.comparison import Findings
    from moeq.evaluation import Evaluation
    from moeq.inspection import Inspection
    from moeq.result import QuantizedModel
    from moeq.tracker import RouterNormTracker
    from vllm_moeq.format import BitPlan

__all__ = [
    "BitPlan",
    "Evaluation",
    "Findings",
    "Inspection",
    "MoeqError",
    "Progress",
    "QuantizedModel",
    "RouterNormTracker",
    "compare",
    "evaluate",
    "inspect",
    "plan",
    "quantize",
    "verify",
]

_LAZY = {
    "BitPlan": "vllm_moeq.format",
    "Evaluation": "moeq.evaluation",
    "Findings": "moeq.comparison",
    "Inspection": "moeq.inspection",
    "QuantizedModel": "moeq.result",
    "RouterNormTracker": "moeq.tracker",
}
"""Names whose modules take seconds to import."""


if not TYPE_CHECKING:  # or every name would be right

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return getattr(import_module(_LAZY[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
