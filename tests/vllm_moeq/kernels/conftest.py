"""Fixtures of tests of kernels."""

from collections.abc import Iterator
from concurrent.futures import Executor

import pytest

from support.interpreter import triton_interpreter


@pytest.fixture(scope="package")
def interpreter() -> Iterator[Executor]:
    """Start a process that interprets Triton kernels, once for all of these tests."""
    with triton_interpreter() as pool:
        yield pool
