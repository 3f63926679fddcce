"""A real ``vllm serve`` process, as the quickstart starts it, with a small context."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving import vllm_server

from support.engine import engine_environment


@contextmanager
def serve(model: Path, log: Path, *options: str) -> Iterator[str]:
    """Start the server, wait until it answers, give its address, stop it at the end."""
    environment = engine_environment()
    # The server shall run as users run it: with its engine in a process of its own.
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    small = ("--max-model-len", "128", "--max-num-seqs", "4")
    with vllm_server(model, log, *small, *options, environment=environment) as address:
        yield address
