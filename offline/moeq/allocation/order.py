"""The order in which a layer's experts get high widths: first means most bits."""

import torch

from moeq.errors import MoeqError
from moeq.requests import DEFAULT_ZETA, REORDERS


def router_norm_order(change: torch.Tensor) -> list[int]:
    """Order experts by ascending router norm change [E]; ties by expert index."""
    order: list[int] = torch.argsort(change, stable=True).tolist()
    return order


def maxvar_order(variance: torch.Tensor) -> list[int]:
    """Order experts by descending MaxVar [E]; ties by expert index."""
    order: list[int] = torch.argsort(variance, descending=True, stable=True).tolist()
    return order


def combined_order(
    change: torch.Tensor,
    variance: torch.Tensor,
    zeta: float = DEFAULT_ZETA,
    variant: str = "stable",
) -> list[int]:
    """Order by router norm change, then let noisy experts overtake (arXiv 2604.06515, section 5).

    Scanning from the last expert to the first, an expert moves up to just before the first expert
    whose MaxVar is below its own by more than the factor ``zeta``; repeated until nothing moves.
    Each expert moves at most once, so this ends.

    Args:
        change: Router norm change [E].
        variance: MaxVar [E].
        zeta: Factor that lets an expert overtake, at least 1.
        variant: ``stable``; or ``one-pass``, which visits each place once, from the last to the
            first, and so passes over an expert that slides into a place already visited.

    Raises:
        MoeqError: ``zeta`` below 1 (the rule would not end), or an unknown variant.
    """
    if not zeta >= 1:
        raise MoeqError(f"`zeta` {zeta:g} must be at least 1")
    if variant not in REORDERS:
        raise MoeqError(f"`reorder` {variant} is not one of {', '.join(REORDERS)}")
    order = router_norm_order(change)
    value = variance.tolist()

    def overtake(place: int) -> bool:
        """Move the expert at ``place`` forward if it may overtake; tell whether it did."""
        expert = order[place]
        for target in range(place):
            if zeta * value[order[target]] < value[expert]:
                order.insert(target, order.pop(place))
                return True
        return False

    if variant == "one-pass":
        for place in reversed(range(len(order))):
            overtake(place)
        return order
    moved = True
    while moved:
        moves = [overtake(order.index(expert)) for expert in reversed(order.copy())]
        moved = any(moves)
    return order
