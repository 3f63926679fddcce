"""Runs ``moeq`` on a disk that fails, and kills it: many runs of a process that has imported all.

A server imports torch and transformers once; every run is a child of it, a process that can be
killed. ``faulty_disk.cpp`` is preloaded into the server and numbers the calls of a run that write
below a folder.
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from moeq.cli import main
from support.cli import ROOT, environment

SHIM = Path(__file__).with_name("faulty_disk.cpp")
CRASHED = 70
"""Exit status of a run that ended with a traceback."""


class Fault(NamedTuple):
    """What goes wrong below a folder.

    Attributes:
        folder: Calls that write below it are numbered from 1.
        number: The one that fails; 0 for none.
        error: With which error of the system; ``-signal.SIGKILL`` kills the process there.
        stays: Whether all calls after it fail, too.
        flock: Error of ``flock`` from the start; 0 for none.
    """

    folder: Path
    number: int = 0
    error: int = 0
    stays: bool = False
    flock: int = 0


class Ended(NamedTuple):
    """How a run ended.

    Attributes:
        status: Its exit status; a signal is negative.
        log: What it printed.
        calls: How many writing calls there were, if it was not killed.
        failed: Name and path of the call that failed.
    """

    status: int
    log: str
    calls: int
    failed: str


class Run:
    """A run of ``moeq`` that was started.

    Attributes:
        pid: Its process, which stays until :meth:`ended` has been asked.
    """

    def __init__(self, server: "Server", log: Path, pid: int) -> None:
        self._server, self._log, self.pid = server, log, pid
        self._descriptor = os.pidfd_open(pid)

    def has_ended(self, seconds: float = 0) -> bool:
        """Wait at most so long for the end; say whether it came."""
        return bool(select.select([self._descriptor], [], [], seconds)[0])

    def kill(self) -> None:
        """Kill it, if it has not ended."""
        os.kill(self.pid, signal.SIGKILL)

    def ended(self) -> Ended:
        """Wait for the end."""
        assert self.has_ended(300), f"moeq hangs: {self._log.read_text()}"
        os.close(self._descriptor)
        status, calls, failed = self._server.ask(["wait", self.pid])
        return Ended(status, self._log.read_text(errors="replace"), calls, failed)


class Server:
    """The process whose children are runs.

    Args:
        process: With pipes to its input and output.
        folder: For logs.
    """

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process, self._folder, self._number = process, folder, 0

    def start(self, *arguments: object, fault: Fault | None = None) -> Run:
        """Start ``moeq`` with arguments."""
        self._number += 1
        log = self._folder / f"{self._number}.log"
        given = None if fault is None else [str(fault.folder), *fault[1:]]
        return Run(self, log, self.ask(["run", [*map(str, arguments)], str(log), given]))

    def run(self, *arguments: object, fault: Fault | None = None) -> Ended:
        """Run ``moeq`` to its end."""
        return self.start(*arguments, fault=fault).ended()

    def ask(self, request: list[Any]) -> Any:
        """Send a request and return the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """Compile the disk that fails, and start a server with it; logs go to the folder."""
    library = folder / "faulty_disk.so"
    command: list[str | Path] = [
        "g++",
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        SHIM,
        "-o",
        library,
        "-ldl",
    ]
    subprocess.run(command, check=True, timeout=120)
    path = os.pathsep.join([environment()["PYTHONPATH"], str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-m", "support.faults"],
        env={
            **environment(),
            "PYTHONPATH": path,
            "LD_PRELOAD": str(library),
            "TOKENIZERS_PARALLELISM": "false",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Server(process, folder)
        process.kill()


def _serve() -> None:
    """Answer requests until there are no more."""
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import moeq.pipeline  # noqa: F401

    logs: dict[int, Path] = {}
    for line in sys.stdin:
        kind, *rest = json.loads(line)
        if kind == "run":
            arguments, log, fault = rest
            if (child := os.fork()) == 0:
                _run(arguments, Path(log), fault)
            logs[child] = Path(log)
            answer: Any = child
        else:
            _, status = os.waitpid(rest[0], 0)
            counted = logs.pop(rest[0]).with_suffix(".calls")
            calls = json.loads(counted.read_text()) if counted.exists() else (0, "")
            answer = [os.waitstatus_to_exitcode(status), *calls]
        print(json.dumps(answer), flush=True)


def _run(arguments: list[str], log: Path, fault: list[Any] | None) -> NoReturn:
    """Be the run: never return."""
    status = CRASHED
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        disk = ctypes.CDLL(None)
        disk.faulty_disk.argtypes = (ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 3)
        disk.faulty_disk_calls.restype = ctypes.c_long
        disk.faulty_disk_failed.restype = ctypes.c_char_p
        if fault is not None:
            disk.faulty_disk(fault[0].encode(), *fault[1:])
        try:
            status = main(arguments)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 2
        calls = [disk.faulty_disk_calls(), disk.faulty_disk_failed().decode()]
        log.with_suffix(".calls").write_text(json.dumps(calls))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
