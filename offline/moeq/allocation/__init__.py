"""From signals to a bit plan."""

from moeq.allocation.budget import (
    average_bits,
    bits_budget,
    bits_per_weight_budget,
    option_sizes,
    parse_size,
    target_size_budget,
)
from moeq.allocation.constraints import Constraints
from moeq.allocation.counts import expert_counts
from moeq.allocation.knapsack import Solution, solve
from moeq.allocation.losses import LossTable, layer_bits, loss_array, solve_group_sizes
from moeq.allocation.milp import solve_constrained
from moeq.allocation.order import REORDER_VARIANTS, combined_order, maxvar_order, router_norm_order
from moeq.allocation.strategies import (
    DEFAULT_GROUP_SIZE,
    MEASURED,
    STRATEGIES,
    PlanOptions,
    PlanSizes,
    make_plan,
    plan_sizes,
    with_sizes,
)

__all__ = [
    "DEFAULT_GROUP_SIZE",
    "MEASURED",
    "REORDER_VARIANTS",
    "STRATEGIES",
    "Constraints",
    "LossTable",
    "PlanOptions",
    "PlanSizes",
    "Solution",
    "average_bits",
    "bits_budget",
    "bits_per_weight_budget",
    "combined_order",
    "expert_counts",
    "layer_bits",
    "loss_array",
    "make_plan",
    "maxvar_order",
    "option_sizes",
    "parse_size",
    "plan_sizes",
    "router_norm_order",
    "solve",
    "solve_constrained",
    "solve_group_sizes",
    "target_size_budget",
    "with_sizes",
]
