"""A Ray cluster of processes on this machine, whose nodes can be killed."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from support.cli import environment


class Nodes:
    """Nodes of one core each, beside one that does no work."""

    def __init__(self, count: int) -> None:
        self._cluster: Any = Cluster()
        self._cluster.add_node(num_cpus=0, include_dashboard=False)
        self._working = [self._cluster.add_node(num_cpus=1) for _ in range(count)]

    @property
    def address(self) -> str:
        """What `moeq quantize --ray` takes."""
        return str(self._cluster.address)

    def add(self) -> None:
        """Start one more."""
        self._working.append(self._cluster.add_node(num_cpus=1))

    def kill(self, node_id: str | None = None) -> None:
        """Kill the processes of a node, as if its machine were lost; by default of any."""
        (node, *_) = [n for n in self._working if node_id in (None, n.node_id)]
        self._working.remove(node)
        parents = [info.process.pid for infos in node.all_processes.values() for info in infos]
        for process in [*_children(parents), *parents]:
            os.kill(process, signal.SIGKILL)

    def stop(self) -> None:
        """Stop what is left."""
        self._cluster.shutdown()


def _children(parents: list[int]) -> list[int]:
    found = [
        Path(f"/proc/{parent}/task/{parent}/children").read_text().split() for parent in parents
    ]
    return [int(process) for processes in found for process in processes]


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """Start a cluster of so many working nodes, which run the code of this clone."""
    before = dict(os.environ)
    os.environ.update(environment(), RAY_USAGE_STATS_ENABLED="0")
    started = Nodes(count)
    try:
        yield started
    finally:
        ray.shutdown()
        started.stop()
        os.environ.clear()
        os.environ.update(before)
