"""Fixtures for all tests."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch starts its threads: the machines that run these tests have few cores, and more
# OpenMP threads than free cores collapse.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from support.kernels import forget_cpu_kernel
from support.models import make_model

# A shell that starts a job in the background lets it ignore SIGINT, and children inherit that;
# with a handler here, they start with the default action, which tests of Ctrl-C need.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what takes longest first, so that processes that share the files end together."""
    items.sort(
        key=lambda item: [item.get_closest_marker(name) is None for name in ("vllm", "slow")]
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny bfloat16 checkpoint of a family."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture
def new_cpu_kernel() -> Iterator[None]:
    """Let a test choose the CPU kernel anew; in a process, the first choice holds."""
    forget_cpu_kernel()
    yield
    forget_cpu_kernel()
