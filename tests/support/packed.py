"""Packed checkpoints for tests, made by the product's own command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

W13_BITS = [2, 3, 4, 8, 1, 3, 2, 4]
W2_BITS = [3, 4, 8, 4, 2, 1, 3, 2]


def moeq(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the ``moeq`` command as a process."""
    command = [sys.executable, "-m", "moeq.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def mixed_plan(model: Path, group_size: int = 32) -> dict[str, Any]:
    """Return a plan with all widths in each layer, w13 and w2 different, layers different."""
    index = moeq("plan", model, "--bits", 3, "--group-size", group_size, "--json")
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
    done = moeq("quantize", model, "-o", output, "--plan", plan)
    assert done.returncode == 0, done.stderr
    return output
