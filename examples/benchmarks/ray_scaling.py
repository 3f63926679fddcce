"""Measures `moeq quantize --ray` with 1 and 2 workers, and models 4.

    OMP_NUM_THREADS=1 python examples/benchmarks/ray_scaling.py --work FOLDER

A cluster of node processes on this machine: one that does no work, and one of a single core for
each worker. The model is random, of Mixtral's form. Every run of the command counts whole, with the
start of Python in every worker; its output must have the bytes of a single process.

This process and the workers share the cores, but it computes while they wait and waits while they
compute, but for what it does with results that are there.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import ray
from calibration_cost import write_model
from ray.cluster_utils import Cluster
from results import RESULTS, table, write_section

MEASURED, MODELLED = (1, 2), 4


def quantize(model: Path, output: Path, method: list[str], extra: list[str]) -> float:
    """Run the command; return its seconds."""
    command = [sys.executable, "-m", "moeq.cli", "quantize", str(model), "-o", str(output)]
    start = time.monotonic()
    subprocess.run([*command, *method, *extra], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def on_cluster(workers: int, model: Path, output: Path, method: list[str]) -> float:
    """Run it with so many workers; return its seconds."""
    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False)
    try:
        for _ in range(workers):
            cluster.add_node(num_cpus=1, object_store_memory=2**30)
        return quantize(model, output, method, ["--ray", cluster.address])
    finally:
        ray.shutdown()
        cluster.shutdown()


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
            seconds = [quantize(model, alone, method, [])]
            for workers in MEASURED:
                output = Path(work) / f"{name} {workers}"
                seconds.append(on_cluster(workers, model, output, method))
                if not same_files(alone, output):
                    sys.exit(f"{name}: {workers} workers gave other bytes than a single process")
            # T(n) = fixed + shared / n, through both measured points.
            shared = (seconds[1] - seconds[2]) / (1 / MEASURED[0] - 1 / MEASURED[1])
            fixed = seconds[1] - shared / MEASURED[0]
            modelled = fixed + shared / MODELLED
            figures = [*seconds, modelled, fixed]
            rows.append([name, *(f"{figure:.0f}" for figure in figures)])
            rows[-1].append(f"{seconds[1] / seconds[2]:.2f}")
    write_section(
        options.results,
        "Cost of calibration",
        "scaling on a Ray cluster",
        [
            f"`moeq quantize --ray`, seconds of the whole command: {options.layers} layers of "
            f"{options.experts} experts of {options.hidden_size} / {options.intermediate_size}, "
            f"{options.nsamples} × 512 tokens. Node processes of one core each on one machine; all "
            f"outputs have the bytes of the single process. {MODELLED} workers are not measured: "
            "they follow from T(n) = fixed + shared / n through the two measured points; the fixed "
            "part is the start of Python here and in the workers, and all that runs in one place: "
            "attention, dense layers, snapshots and writing.",
            table(
                [
                    "", "no cluster", "1 worker", "2 workers", f"{MODELLED} workers (modelled)",
                    "fixed part (modelled)", "2 workers against 1",
                ],
                rows,
            ),
        ],
        packages=("torch", "ray", "vllm-moeq"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
