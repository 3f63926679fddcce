"""From signals to a bit plan."""

from moeq.allocation.budget import (
    average_bits,
    bits_budget,
    file_budget,
    file_bytes,
    fits_file,
)
from moeq.allocation.constraints import Constraints
from moeq.allocation.counts import expert_counts
from moeq.allocation.knapsack import Solution, solve
from moeq.allocation.losses import (
    EXPERTS_ONLY,
    LINEAR_OPTIONS,
    LinearChoice,
    LossTable,
    allocate,
    fulfils,
    possible_group_sizes,
)
from moeq.allocation.milp import solve_constrained
from moeq.allocation.order import combined_order, maxvar_order, router_norm_order
from moeq.allocation.strategies import (
    DEFAULT_GROUP_SIZE,
    PlanOptions,
    make_plan,
    ordered_bits,
)

__all__ = [
    "DEFAULT_GROUP_SIZE",
    "EXPERTS_ONLY",
    "LINEAR_OPTIONS",
    "Constraints",
    "LinearChoice",
    "LossTable",
    "PlanOptions",
    "Solution",
    "allocate",
    "average_bits",
    "bits_budget",
    "combined_order",
    "expert_counts",
    "file_budget",
    "file_bytes",
    "fits_file",
    "fulfils",
    "make_plan",
    "maxvar_order",
    "ordered_bits",
    "possible_group_sizes",
    "router_norm_order",
    "solve",
    "solve_constrained",
]
