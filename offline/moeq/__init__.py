"""The offline step of vllm-moeq: reads a checkpoint, decides a bit plan, quantizes and packs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeq.tracker import RouterNormTracker

__all__ = ["RouterNormTracker"]


def __getattr__(name: str) -> Any:
    # Lazy: the tracker imports transformers, which most commands do not need.
    if name == "RouterNormTracker":
        from moeq.tracker import RouterNormTracker

        return RouterNormTracker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
