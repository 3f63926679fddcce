"""Signals that say how much an expert suffers from low precision."""

from moeq.signals.maxvar import MAXVAR_VARIANTS, max_var
from moeq.signals.router_norm import RouterNorms, load_base_routers, router_norms

__all__ = [
    "MAXVAR_VARIANTS",
    "RouterNorms",
    "load_base_routers",
    "max_var",
    "router_norms",
]
