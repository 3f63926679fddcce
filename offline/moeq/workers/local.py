"""Work in this process: on one device, or by threads beside each other."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from threading import local
from typing import Protocol, TypeVar

import torch

_AHEAD = 2
"""Items for each thread that are begun before their results are asked for."""
Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[torch.device, Shared, Item], Iterator[Result]]
"""Takes the device to work on, what all items need, and an item; yields results, whose tensors are
on the CPU. It changes nothing that it gets, since others may read it."""


class Workers(Protocol):
    """Who does work whose parts do not need each other."""

    @property
    def count(self) -> int:
        """How many items are worked on beside each other."""

    def flat_map(
        self, work: Work[Shared, Item, Result], shared: Shared, items: Iterable[Item]
    ) -> Generator[Result]:
        """Do work for each item.

        Args:
            work: A function of a module, so that other processes have it, too.
            shared: What all items need.
            items: Of which each is done on one device.

        Yields:
            The results of all items, in the order of the items.

        Raises:
            MoeqError: As the work itself, or the workers are lost.
        """


@dataclass(frozen=True, slots=True)
class OneByOne:
    """Works on one device, and only when the next result is asked for.

    Attributes:
        device: Where.
    """

    device: torch.device

    @property
    def count(self) -> int:
        """See :class:`Workers`."""
        return 1

    def flat_map(
        self, work: Work[Shared, Item, Result], shared: Shared, items: Iterable[Item]
    ) -> Generator[Result]:
        """See :class:`Workers`."""
        for item in items:
            yield from work(self.device, shared, item)


@dataclass(frozen=True, slots=True)
class Threads:
    """Works on several devices, or with several cores, each by a thread of its own.

    Attributes:
        devices: One for each thread.
        cores: That torch takes in each thread; None leaves it as it is.
    """

    devices: Sequence[torch.device]
    cores: int | None = None

    @property
    def count(self) -> int:
        """See :class:`Workers`."""
        return len(self.devices)

    def flat_map(
        self, work: Work[Shared, Item, Result], shared: Shared, items: Iterable[Item]
    ) -> Generator[Result]:
        """See :class:`Workers`."""
        own, free = local(), SimpleQueue[torch.device]()
        for device in self.devices:
            free.put(device)

        def begin() -> None:
            own.device = free.get()
            if own.device.type == "cuda":  # kernels of Triton start on the thread's own device
                torch.cuda.set_device(own.device)
            if self.cores is not None:
                torch.set_num_threads(self.cores)

        def results(item: Item) -> list[Result]:
            return list(work(own.device, shared, item))

        remaining, pending = iter(items), deque[Future[list[Result]]]()
        before = torch.get_num_threads()
        pool = ThreadPoolExecutor(len(self.devices), initializer=begin)
        try:
            while True:
                for item in islice(remaining, _AHEAD * len(self.devices) - len(pending)):
                    pending.append(pool.submit(results, item))
                if not pending:
                    return
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            if self.cores is not None:  # threads to come take what was set last in any of them
                torch.set_num_threads(before)


def on_devices(devices: Sequence[torch.device], at_once: int = 1) -> Workers:
    """Return who works on these devices.

    Args:
        devices: Which.
        at_once: Items that each works on beside each other, with equal shares of the cores.
    """
    if len(devices) == at_once == 1:
        return OneByOne(devices[0])
    cores = torch.get_num_threads() // at_once if at_once > 1 else None
    return Threads([device for device in devices for _ in range(at_once)], cores)
