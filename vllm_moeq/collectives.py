"""What ranks of data parallelism exchange on CPUs: rows of tensors, as many as each rank has."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def all_gather_rows(
    rows: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Return the rows of all ranks, in their order.

    Args:
        rows: [sizes[rank], ...] of this rank, alike on all of them but for the number of rows.
        sizes: Rows of each rank.
        group: Of these ranks; gloo will do.

    Returns:
        [sum(sizes), ...].
    """
    result = rows.new_empty(sum(sizes), *rows.shape[1:])
    # gloo's own all_gather takes equal sizes only.
    copies = torch.cat([rows] * len(sizes))
    dist.all_to_all_single(result, copies, list(sizes), [len(rows)] * len(sizes), group=group)
    return result


def reduce_scatter_rows(
    rows: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Return the rows of this rank, summed over all ranks.

    Args:
        rows: [sum(sizes), ...] of this rank's parts of all sums.
        sizes: Rows of each rank.
        group: Of these ranks; gloo will do.

    Returns:
        [sizes[rank], ...].
    """
    own = sizes[dist.get_rank(group)]
    parts = rows.new_empty(len(sizes), own, *rows.shape[1:])
    dist.all_to_all_single(
        parts.flatten(0, 1), rows.contiguous(), [own] * len(sizes), list(sizes), group=group
    )
    return parts.sum(0)
