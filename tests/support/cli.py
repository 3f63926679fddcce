"""Runs the real ``moeq`` command in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "moeq.cli")
INTERRUPTED = (130, -signal.SIGINT)
"""Exit statuses after Ctrl-C; a shell shows both as 130. The second is Python's own, if it came
while a module was imported."""


def environment() -> dict[str, str]:
    """Return the environment of a command: works without an installation, never asks the hub."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "offline")))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_moeq(
    *arguments: object, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``moeq`` to its end; ``before`` runs in the new process first."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=before,
    )


def start_moeq(*arguments: object) -> subprocess.Popen[str]:
    """Start ``moeq`` and return the process."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
