"""Packed checkpoints for tests, made in this process: torch and transformers are loaded already."""

from pathlib import Path

import moeq
from moeq.checkpoint import SourceModel
from moeq.checkpoint.data_free import DataFree
from moeq.checkpoint.workspace import Workspace
from moeq.checkpoint.writer import DEFAULT_SHARD_BYTES, Conversion
from vllm_moeq.format import BitPlan, LayerBits

W13_BITS = [2, 3, 4, 8, 1, 3, 2, 4]
W2_BITS = [3, 4, 8, 4, 2, 1, 3, 2]


def mixed_plan(model: Path, group_size: int = 32) -> BitPlan:
    """Return a plan with all widths in each layer, w13 and w2 different, layers different."""
    return BitPlan(
        group_size,
        {
            layer.container: LayerBits(
                tuple(W13_BITS[number:] + W13_BITS[:number]),
                tuple(W2_BITS[number:] + W2_BITS[:number]),
            )
            for number, layer in enumerate(SourceModel.open(model).layers)
        },
    )


def pack_mixed(model: Path, output: Path, group_size: int = 32) -> Path:
    """Quantize ``model`` with :func:`mixed_plan`."""
    return moeq.quantize(model, output, plan=mixed_plan(model, group_size), method="rtn").path


def write_packed(
    model: Path, output: Path, plan: BitPlan, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Path:
    """Write a packed checkpoint in this process, rounded to nearest."""
    source = SourceModel.open(model)
    with Workspace.open(output, resume=False) as workspace:
        conversion = Conversion.prepare(source, plan, shard_bytes)
        conversion.write(workspace.partial, DataFree(source, "rtn", plan.group_size))
        workspace.publish()
    return output
