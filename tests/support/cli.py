"""Runs the real ``moeq`` command."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import cast

from moeq.cli import main

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "moeq.cli")
INTERRUPTED = (130, -signal.SIGINT)
"""Exit statuses after Ctrl-C; a shell shows both as 130. The second is Python's own, if it came
while a module was imported."""


def environment() -> dict[str, str]:
    """Return the environment of a command: works without an installation, never asks the hub.

    It takes as many threads as this process: with others, sums have other last digits.
    """
    path = os.pathsep.join((str(ROOT), str(ROOT / "offline")))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run_moeq(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the ``moeq`` command in this process, which has imported already what it needs."""
    output, errors = io.StringIO(), io.StringIO()
    given = [*map(str, arguments)]
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            status = main(given)
        except SystemExit as error:
            status = cast(int, error.code)
    return subprocess.CompletedProcess(given, status, output.getvalue(), errors.getvalue())


def run_moeq_alone(
    *arguments: object, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``moeq`` in a process of its own to its end; ``before`` runs in it first."""
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
