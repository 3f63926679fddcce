"""A ``vllm serve`` process that ends with the program that started it, however that ends."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_POLL_SECONDS = 0.5
_STOP_SECONDS = 30.0
_LOG_LINES = 30

# A proxy is of no use on the way to a server on this very machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server ended before it answered; the message holds the end of its log."""


def urlopen(request: str | urllib.request.Request, timeout: float) -> bytes:
    """Return the body of an HTTP answer from this machine."""
    with _opener.open(request, timeout=timeout) as response:
        body: bytes = response.read()
    return body


def exit_on_sigterm() -> None:
    """Make SIGTERM and SIGHUP end the program as Ctrl-C does, so that servers are stopped."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)


@contextmanager
def vllm_server(
    model: str | Path,
    log: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Serve a model on a free port of this machine; give its address once it answers.

    Args:
        model: Folder or hub id.
        log: File for the server's output.
        options: More arguments of ``vllm serve``.
        environment: Environment of the server; None takes this program's.

    Raises:
        ServerError: The server ended before it answered.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = ["vllm", "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as output:
        # A session of its own: Ctrl-C reaches the server through us only, and its workers form
        # one process group with it.
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        _wait_until_healthy(server, address, log)
        yield address
    finally:
        _stop(server)


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    # No time limit: a large model may load for long, and a server that cannot start ends.
    while server.poll() is None:
        try:
            urlopen(f"{address}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_SECONDS)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    raise ServerError(f"the server did not start; the end of {log}:\n{tail}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and its workers, first by asking; nothing interrupts this."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=_STOP_SECONDS)
        # Workers that outlived it, or all of them if it did not listen.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
