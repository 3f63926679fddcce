"""A server that a program started is gone when the program is gone, however it went.

The servers here are stand-ins named ``vllm`` that misbehave on purpose; test_quickstart.py runs a
real one.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

_PROGRAM = """
import sys, time
sys.path.insert(0, {examples!r})
from pathlib import Path
from serving import exit_on_sigterm, vllm_server
exit_on_sigterm()
with vllm_server("model", Path({log!r})) as address:
    print("healthy", flush=True)
    {body}
"""
_NEVER_HEALTHY = "time.sleep(600)"
_HEALTHY = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
_DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def _start(tmp_path: Path, server: str, body: str = "pass") -> subprocess.Popen[str]:
    """Start a program that serves with a stand-in; the stand-in notes its process id."""
    stand_in = tmp_path / "bin" / "vllm"
    stand_in.parent.mkdir()
    pid_file = tmp_path / "pid"
    stand_in.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n{server}\n"
    )
    stand_in.chmod(0o755)
    program = _PROGRAM.format(examples=str(EXAMPLES), log=str(tmp_path / "log"), body=body)
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _server_pid(tmp_path: Path) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        path = tmp_path / "pid"
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError("the stand-in did not start")


def _assert_gone(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    process = _start(tmp_path, "sys.exit('no such model')")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the server did not start" in errors
    assert "no such model" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_waiting_stops_the_server(tmp_path: Path, number: signal.Signals) -> None:
    process = _start(tmp_path, _NEVER_HEALTHY)
    pid = _server_pid(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    _assert_gone(pid)


@pytest.mark.parametrize("body", ["raise RuntimeError('measuring failed')", "sys.exit(3)"])
def test_a_failure_after_the_start_stops_the_server(tmp_path: Path, body: str) -> None:
    process = _start(tmp_path, _HEALTHY, body)
    output, _ = process.communicate(timeout=60)
    assert "healthy" in output
    assert process.returncode in (1, 3)
    _assert_gone(_server_pid(tmp_path))


def test_the_server_stops_when_all_is_done_even_behind_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    process = _start(tmp_path, _HEALTHY)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    _assert_gone(_server_pid(tmp_path))


@pytest.mark.slow
def test_an_impatient_user_does_not_leave_a_deaf_server_behind(tmp_path: Path) -> None:
    process = _start(tmp_path, _DEAF + _NEVER_HEALTHY)
    pid = _server_pid(tmp_path)
    process.terminate()
    time.sleep(1)
    process.terminate()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=90)
    assert process.returncode != 0
    _assert_gone(pid)
