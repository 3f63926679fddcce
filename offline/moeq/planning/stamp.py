"""What a plan says of itself must hold for the widths that it has and the way it is rounded."""

import hashlib
import json
from dataclasses import replace

from vllm_moeq.format import BitPlan

_CLAIMS = ("tried", "estimated_divergence", "gap_to_the_best_plan")
"""What was measured of the widths of a plan."""


def stamped(plan: BitPlan, method: str) -> BitPlan:
    """Return a plan that knows for which widths and which rounding its provenance was written."""
    details = {**plan.provenance.details, "digest": _digest(plan), "method": method}
    return replace(plan, provenance=replace(plan.provenance, details=details))


def without_stale_claims(plan: BitPlan, method: str) -> BitPlan:
    """Return a plan that somebody gave, without what holds no longer.

    Args:
        plan: Made by moeq and perhaps edited since, or written by hand.
        method: How it will be rounded.
    """
    provenance = plan.provenance
    details = dict(provenance.details)
    if "digest" not in details:
        return plan
    strategy, edited = provenance.strategy, details["digest"] != _digest(plan)
    if edited:
        strategy = f"edited (was {strategy})"
    if edited or details.get("method") != method:
        details = {name: value for name, value in details.items() if name not in _CLAIMS}
    return replace(plan, provenance=replace(provenance, strategy=strategy, details=details))


def _digest(plan: BitPlan) -> str:
    widths = {name: bits.to_dict() for name, bits in plan.expert_bits.items()}
    linear = [dict(plan.linear_bits)] if plan.linear_bits else []  # plans of before have none
    text = json.dumps([plan.group_size, widths, *linear], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
