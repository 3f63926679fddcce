"""How plans are worded, in model cards, on pages and on the command line."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_moeq.format import BitPlan


def size_of_tried(tried: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of the size to show of plans that were tried; older ones have but one."""
    return "total_bytes" if "total_bytes" in tried[0] else "expert_bytes"


def linear_summary(plan: BitPlan) -> str:
    """Return in a line how many dense layers have which width."""
    if not plan.linear_bits:
        return "16 bits, as they are"
    counts = sorted(Counter(plan.linear_bits.values()).items(), reverse=True)
    return ", ".join(f"{count} of {bits} bits" for bits, count in counts) + "; all others 16"
