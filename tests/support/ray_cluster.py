"""A Ray cluster of processes on this machine, whose nodes can be killed."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from support.cli import ROOT, environment


class Nodes:
    """Nodes of one core each; all but the first can be killed."""

    def __init__(self, count: int) -> None:
        self._cluster: Any = Cluster()
        self._cluster.add_node(num_cpus=1, include_dashboard=False)
        self._mortal = [self._cluster.add_node(num_cpus=1) for _ in range(count - 1)]

    @property
    def address(self) -> str:
        """What `moeq quantize --ray` takes."""
        return str(self._cluster.address)

    @property
    def mortal(self) -> list[str]:
        """Ids of nodes that can be killed."""
        return [node.node_id for node in self._mortal]

    def kill(self, node_id: str) -> None:
        """Kill the processes of a node, as if its machine were lost."""
        (node,) = [node for node in self._mortal if node.node_id == node_id]
        self._mortal.remove(node)
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
    """Start a cluster of so many nodes, which run the code of this clone."""
    before = dict(os.environ)
    os.environ.update(environment(), RAY_USAGE_STATS_ENABLED="0")
    os.environ["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
    started = Nodes(count)
    try:
        yield started
    finally:
        ray.shutdown()
        started.stop()
        os.environ.clear()
        os.environ.update(before)
