"""Measures `moeq quantize --ray` with 1 and 2 workers, and models 2 and 4.

    OMP_NUM_THREADS=1 python examples/benchmarks/ray_scaling.py --work FOLDER

A cluster of node processes on this machine: one that does no work, and one of a single core for
each worker. The model is random, of Mixtral's form. Every run of the command counts whole, with the
start of Python in every worker; its output must have the bytes of a single process.

Two workers are also modelled, and 4, from processor time, which other work on the machine hardly
changes: what the command itself takes with a cluster stays, the rest of what it takes alone is
shared. That leaves out the start of Python in the workers and what Ray adds.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ray
from calibration_cost import write_model
from ray.cluster_utils import Cluster
from results import RESULTS, table, write_section

MEASURED, MODELLED = (1, 2), (2, 4)


class Cost(NamedTuple):
    """Seconds of a command: by the clock, and of processors in its own process."""

    clock: float
    processor: float


def quantize(model: Path, output: Path, method: list[str], extra: list[str]) -> Cost:
    """Run the command."""
    command = [sys.executable, "-m", "moeq.cli", "quantize", str(model), "-o", str(output)]
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, *method, *extra], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(time.monotonic() - start, processor)


def on_cluster(workers: int, model: Path, output: Path, method: list[str]) -> Cost:
    """Run it with so many workers."""
    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False)
    try:
        for _ in range(workers):
            cluster.add_node(num_cpus=1, object_store_memory=2**30)
        return quantize(model, output, method, ["--ray", cluster.address])
    finally:
        ray.shutdown()
        cluster.shutdown()


def modelled(alone: float, own: float, workers: int) -> float:
    """Return how many times as fast workers are, from seconds of processors.

    Args:
        alone: Of the command without a cluster.
        own: Of the command with one, which stays.
        workers: That share the rest.
    """
    return alone / (own + (alone - own) / workers)


def row_of(name: str, costs: Sequence[Cost]) -> list[str]:
    """Return a row of the table: without a cluster, then with each number of workers."""
    alone, own = costs[0].processor, costs[-1].processor
    seconds = [*(cost.clock for cost in costs), alone, own]
    speedups = [f"{modelled(alone, own, workers):.2f}" for workers in MODELLED]
    return [name, *(f"{value:.0f}" for value in seconds), *speedups]


def same_files(first: Path, second: Path) -> bool:
    """Tell whether two folders hold the same bytes."""
    names = {path.name for path in first.iterdir()}
    return names == {path.name for path in second.iterdir()} and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names
    )


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="default 2")
    parser.add_argument("--experts", type=int, default=8, help="of each layer (default 8)")
    parser.add_argument("--hidden-size", type=int, default=1024, help="default 1024")
    parser.add_argument("--intermediate-size", type=int, default=3584, help="default 3584")
    parser.add_argument("--nsamples", type=int, default=32, help="default 32")
    parser.add_argument("--work", type=Path, help="folder for the model and the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    shape = Namespace(**vars(options), used=options.experts)
    methods = {
        "GPTQ": ["--calib", "default", "--nsamples", str(options.nsamples)],
        "round to nearest": ["--calib", "none"],
    }
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        model = Path(work) / "model"
        write_model(model, shape)
        for name, method in methods.items():
            method += ["--bits", "2", "--strategy", "uniform", "--dense-bits", "16"]
            alone = Path(work) / f"{name} alone"
            costs = [quantize(model, alone, method, [])]
            for workers in MEASURED:
                output = Path(work) / f"{name} {workers}"
                costs.append(on_cluster(workers, model, output, method))
                if not same_files(alone, output):
                    sys.exit(f"{name}: {workers} workers gave other bytes than a single process")
            rows.append(row_of(name, costs))
    load = os.getloadavg()[2]
    write_section(
        options.results,
        "Cost of calibration",
        "scaling on a Ray cluster",
        [
            f"`moeq quantize --ray`: layers × experts {options.layers} × {options.experts}, "
            f"hidden / intermediate size {options.hidden_size} / {options.intermediate_size}, "
            f"{options.nsamples} × 512 tokens; node processes of one core each on one machine. "
            f"All outputs have the bytes of the single process. The mean load was {load:.1f} on "
            f"{os.cpu_count()} cores, all runs included, so seconds by the clock are rough. "
            "Speed-ups are not measured but modelled from processor time: what the command itself "
            "takes with 2 workers stays, the rest of what it takes alone is shared. Of a small "
            "model most of what stays is the start of Python and torch.",
            table(
                [
                    "", "no cluster, s", "1 worker, s", "2 workers, s", "processor alone, s",
                    "processor of the command with 2 workers, s",
                    *(f"{workers} workers, modelled, times" for workers in MODELLED),
                ],
                rows,
            ),
        ],
        packages=("torch", "ray", "vllm-moeq"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
