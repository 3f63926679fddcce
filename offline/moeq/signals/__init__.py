"""Signals that say how much an expert suffers from low precision."""

from moeq.signals.maxvar import max_var
from moeq.signals.router_norm import RouterNorms, load_base_routers, router_norms

__all__ = [
    "RouterNorms",
    "load_base_routers",
    "max_var",
    "router_norms",
]
