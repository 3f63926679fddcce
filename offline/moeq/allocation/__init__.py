"""From signals to a bit plan."""

from moeq.allocation.counts import expert_counts
from moeq.allocation.order import REORDER_VARIANTS, combined_order, maxvar_order, router_norm_order
from moeq.allocation.strategies import (
    STRATEGIES,
    PlanOptions,
    PlanSizes,
    make_plan,
    plan_sizes,
    with_sizes,
)

__all__ = [
    "REORDER_VARIANTS",
    "STRATEGIES",
    "PlanOptions",
    "PlanSizes",
    "combined_order",
    "expert_counts",
    "make_plan",
    "maxvar_order",
    "plan_sizes",
    "router_norm_order",
    "with_sizes",
]
