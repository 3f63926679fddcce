"""Packed checkpoints for tests, made by the product's own command line."""

import json
from pathlib import Path
from typing import Any

from moeq.checkpoint import SourceModel
from moeq.checkpoint.data_free import DataFree
from moeq.checkpoint.workspace import Workspace
from moeq.checkpoint.writer import DEFAULT_SHARD_BYTES, Conversion
from support.cli import run_moeq
from vllm_moeq.format import BitPlan

W13_BITS = [2, 3, 4, 8, 1, 3, 2, 4]
W2_BITS = [3, 4, 8, 4, 2, 1, 3, 2]


def mixed_plan(model: Path, group_size: int = 32) -> dict[str, Any]:
    """Return a plan with all widths in each layer, w13 and w2 different, layers different."""
    index = run_moeq(
        "plan", model, "--bits", 3, "--group-size", group_size, "--calib", "none", "--json"
    )
    assert index.returncode == 0, index.stderr
    containers = json.loads(index.stdout)["expert_bits"]
    return {
        "format_version": 1,
        "group_size": group_size,
        "expert_bits": {
            container: {
                "w13": W13_BITS[layer:] + W13_BITS[:layer],
                "w2": W2_BITS[layer:] + W2_BITS[:layer],
            }
            for layer, container in enumerate(containers)
        },
    }


def pack_mixed(model: Path, output: Path, group_size: int = 32) -> Path:
    """Quantize ``model`` with :func:`mixed_plan`."""
    plan = output.with_suffix(".plan.json")
    plan.write_text(json.dumps(mixed_plan(model, group_size)))
    done = run_moeq("quantize", model, "-o", output, "--plan", plan, "--method", "rtn")
    assert done.returncode == 0, done.stderr
    return output


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
