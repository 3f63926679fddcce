"""Collectives between real processes, against what one process computes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from vllm_moeq.collectives import all_gather_rows, reduce_scatter_rows

SIZES = [3, 0, 5]
"""Rows of ranks 1 to 3; rank 0 is in another group."""


def _values(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(7, rows, 2, generator=generator) * 100).to(dtype).transpose(0, 1)


def _run(rank: int, folder: Path, dtype: torch.dtype) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    group = dist.new_group([1, 2, 3])
    if rank:
        found = (
            all_gather_rows(_values(rank, SIZES[rank - 1], dtype), SIZES, group),
            reduce_scatter_rows(_values(rank, sum(SIZES), dtype), SIZES, group),
        )
        torch.save(found, folder / str(rank))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_rows_of_unequal_ranks(dtype: torch.dtype, tmp_path: Path) -> None:
    start_processes(_run, (tmp_path, dtype), nprocs=4, start_method="fork")

    rows = torch.cat([_values(rank, SIZES[rank - 1], dtype) for rank in (1, 2, 3)])
    parts = torch.stack([_values(rank, sum(SIZES), dtype) for rank in (1, 2, 3)])
    sums = parts.double().sum(0).to(dtype).split(SIZES)
    for rank in (1, 2, 3):
        gathered, reduced = torch.load(tmp_path / str(rank))
        assert torch.equal(gathered, rows)
        torch.testing.assert_close(reduced, sums[rank - 1])
