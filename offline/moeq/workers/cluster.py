"""Work on the machines of a Ray cluster: lost machines are no loss of work.

Ray runs a task again if its process or machine dies, and makes results again that were lost with
one. What all tasks need goes into its object store once, from which processes of a machine read it
without a copy.
"""

import logging
import socket
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moeq.errors import MoeqError
from moeq.workers.local import Item, Result, Shared, Work
from vllm_moeq._version import __version__
from vllm_moeq.kernels import cpu

logger = logging.getLogger(__name__)

PROCESS_BYTES = 10**9
"""Of a worker beside its work: Python, torch and transformers."""
_RETRIES = 5
"""How often the work of a lost process or machine is done again."""
_AHEAD = 2
"""Tasks for each that can run at once, so that none waits for this process."""
_PATIENCE = 60.0
"""Seconds without a result after which is asked whether anybody is left to work."""
_SECONDS_TO_CONNECT, _SECONDS_TO_ANSWER = 10.0, 600.0  # at first a node compiles the kernel
_Bytes = tuple[np.ndarray, torch.dtype, torch.Size]


class Node(NamedTuple):
    """What a machine has.

    Attributes:
        files: Bytes of the files of the model, by name; empty if its folder is not there.
        others: Whatever else may change the bytes of results, by its name.
    """

    files: dict[str, int]
    others: dict[str, str]

    @classmethod
    def here(cls, folder: Path) -> "Node":
        """Look at this machine, and at the folder of the model."""
        files = {}
        if folder.is_dir():
            files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        others = {name: version(name) for name in ("torch", "transformers")}
        others["instruction set"] = torch.backends.cpu.get_cpu_capability()
        others["C++ kernel"] = "none" if cpu.unavailable(torch.device("cpu")) else "compiled"
        return cls(files, others)


@contextmanager
def connected(address: str | None, folder: Path) -> Iterator[None]:
    """Connect to a Ray cluster, and check that its nodes can do the work.

    Args:
        address: Of the cluster, as of ``ray.init``; None connects to nothing. A connection that
            the caller has already is used, and kept.
        folder: Of the model, which all nodes have to see.

    Raises:
        MoeqError: Ray is not installed, the cluster is out of reach, or a node has another version
            of vllm-moeq or another model in that place; names it.
    """
    if address is None:
        yield
        return
    try:
        import ray
    except ImportError:
        raise MoeqError("`ray` needs a package: pip install 'vllm-moeq[ray]'") from None
    own = not ray.is_initialized()
    if own:
        _connect(address)
    try:
        _send_tensors_with(_borrowed)
        check(Node.here(folder.absolute()), _nodes(folder.absolute()))
        yield
    finally:
        ray.util.deregister_serializer(torch.Tensor)
        if own:
            ray.shutdown()


@dataclass(frozen=True, slots=True)
class Cluster:
    """Workers of the Ray cluster that this process is connected to.

    Attributes:
        kind: ``cuda``: a GPU for each worker; or ``cpu``.
        cores: Of each worker. As many as an expert gets here: another number gives other bytes.
        memory: Bytes that each may take beside a GPU.

    Raises:
        MoeqError: No node has that much.
    """

    kind: str
    cores: int = 1
    memory: int = 0

    def __post_init__(self) -> None:
        if self.count == 0:
            needed = "a GPU" if self.kind == "cuda" else f"{self.cores} cores (OMP_NUM_THREADS)"
            if self.memory:
                needed += f" and {self.memory:,} bytes of memory"
            raise MoeqError(f"no node of the Ray cluster has {needed} for a worker")

    @property
    def count(self) -> int:
        """See :class:`moeq.workers.Workers`; nodes may come and go."""
        import ray

        names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        wanted = {names[name]: amount for name, amount in self._resources.items()}
        return sum(
            min(int(node["Resources"].get(name, 0) // amount) for name, amount in wanted.items())
            for node in ray.nodes()
            if node["Alive"]
        )

    def flat_map(
        self, work: Work[Shared, Item, Result], shared: Shared, items: Iterable[Item]
    ) -> Generator[Result]:
        """See :class:`moeq.workers.Workers`."""
        import ray

        task = ray.remote(
            max_calls=0,  # else a process that has had a GPU ends after each task
            max_retries=_RETRIES,
            scheduling_strategy="SPREAD",
            **self._resources,
        )(_results)
        reference, remaining = ray.put(shared), iter(items)
        pending: deque[Any] = deque()
        most = max(1, _AHEAD * self.count)
        try:
            while True:
                for item in islice(remaining, most - len(pending)):
                    pending.append(
                        task.remote(__version__, self.kind, self.cores, work, reference, item)
                    )
                if not pending:
                    return
                yield from self._wait(pending[0])
                pending.popleft()
        finally:
            if ray.is_initialized():  # else it would connect again
                for unfinished in pending:
                    ray.cancel(unfinished)

    @property
    def _resources(self) -> dict[str, int]:
        if self.kind == "cuda":
            return {"num_cpus": 1, "num_gpus": 1}
        return {"num_cpus": self.cores} | ({"memory": self.memory} if self.memory else {})

    def _wait(self, reference: Any) -> list[Any]:
        """Return the results of a task."""
        import ray

        try:
            while not ray.wait([reference], timeout=_PATIENCE)[0]:
                if self.count == 0:
                    raise MoeqError(
                        "the Ray cluster has lost all nodes that could work. Start others, and run "
                        "the command again, with `resume` where it rounds by text"
                    )
            results: list[Any] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error
            raise
        except ray.exceptions.RayError as error:
            raise MoeqError(
                f"work on the Ray cluster was lost, {_RETRIES + 1} times or for good: {error}. Run "
                "the command again, with `resume` where it rounds by text"
            ) from error
        return results


def _results(
    wanted: str, kind: str, cores: int, work: Work[Any, Any, Any], shared: Any, item: Any
) -> list[Any]:
    """Do the work of an item; this runs on a node."""
    if wanted != __version__:  # a node that came later
        raise MoeqError(
            f"{socket.gethostname()} has vllm-moeq {__version__}, not {wanted}: install the same "
            "version on all nodes"
        )
    torch.set_num_threads(cores)
    _send_tensors_with(_owned)
    return list(work(torch.device(kind), shared, item))


def _send_tensors_with(restore: Callable[[_Bytes], torch.Tensor]) -> None:
    """Send tensors from this process as arrays: Ray copies those only to other machines."""
    import ray

    ray.util.register_serializer(torch.Tensor, serializer=_bytes, deserializer=restore)


def _bytes(tensor: torch.Tensor) -> _Bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy(), flat.dtype, tensor.shape


def _borrowed(parts: _Bytes) -> torch.Tensor:
    """Return a tensor in memory that others read, too, and that nobody can write to."""
    array, dtype, shape = parts
    if not array.size:  # torch cannot view nothing as another type
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array).view(dtype).view(shape)


def _owned(parts: _Bytes) -> torch.Tensor:
    """Return a tensor in memory of its own, which leaves the space of the object store."""
    return _borrowed(parts).clone()


def _connect(address: str) -> None:
    """Connect this process to a cluster."""
    import ray

    wanted = "give `ray` the address of a cluster whose nodes run `ray start`"
    host, colon, port = address.rpartition(":")
    if "://" in address:
        raise MoeqError(f"`ray` {address} is no node of the cluster: run moeq on one of its nodes")
    try:
        if colon:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), _SECONDS_TO_CONNECT).close()
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MoeqError(f"`ray` {address} cannot be reached: {reason}; {wanted}") from error


def _nodes(folder: Path) -> dict[str, "Node | str"]:
    """Ask every node what it has: by its name that, or why it cannot say."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def asked(wanted: str) -> Any:
        """Pickled as it is here, since a node with another version may not have it."""
        try:
            from vllm_moeq._version import __version__

            if __version__ != wanted:
                return f"it has {__version__}"
            from moeq.workers.cluster import Node
        except ImportError as error:
            return str(error)
        return Node.here(folder)

    ask = ray.remote(num_cpus=0)(asked)
    answers = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})"
            answers[name] = ask.options(scheduling_strategy=there).remote(__version__)
    nodes = {}
    for name, answer in answers.items():
        try:
            nodes[name] = ray.get(answer, timeout=_SECONDS_TO_ANSWER)
        except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
            logger.warning("node %s of the Ray cluster was lost a moment ago", name)
        except ray.exceptions.RayError as error:
            raise MoeqError(f"node {name} of the Ray cluster does not answer: {error}") from error
    return nodes


def check(here: Node, nodes: Mapping[str, Node | str]) -> None:
    """Check that nodes have what this machine has.

    Args:
        here: This machine.
        nodes: By name what each has, or why it has no vllm-moeq of this version.

    Raises:
        MoeqError: vllm-moeq or the model differs; names the node.
    """
    for name, node in nodes.items():
        if isinstance(node, str):
            raise MoeqError(
                f"node {name} of the Ray cluster lacks vllm-moeq {__version__} ({node}): install "
                "the same version on all nodes"
            )
        if node.files != here.files:
            raise MoeqError(
                f"node {name} of the Ray cluster does not see the files of the model that this "
                "machine sees: put `model` into a folder that all nodes share"
            )
        for what, value in node.others.items():
            if value != here.others[what]:
                logger.warning(
                    "node %s of the Ray cluster has %s %s, this machine %s: the result may not be "
                    "that of a single process",
                    name, what, value, here.others[what],
                )  # fmt: skip
