"""Disks that fail and runs that are killed, at every point: what is resumed gives the same bytes.

A few points in CI; ``MOEQ_FAULTS=50`` kills 50 times, and lets every call fail that writes.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from moeq.checkpoint.workspace import Workspace
from support.cli import environment
from support.faults import Ended, Fault, Run, Server, server

pytestmark = pytest.mark.slow

TEXT = "".join(f"Line {i} of a text whose bytes are tokens, {i * i % 97}.\n" for i in range(400))
FEW = 4
FAULTS = int(os.environ.get("MOEQ_FAULTS", FEW))
"""Kills of each kind; more than a few let every writing call fail once."""


@pytest.fixture(scope="module")
def moeq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("faults")) as found:
        assert found.run("--version").status == 0  # it imports first, which is no part of a run
        yield found


class Task(NamedTuple):
    """A command that writes ``out`` into a folder.

    Attributes:
        moeq: Runs it.
        arguments: With those of ``--output``.
        folder: Of the output.
        expected: The bytes of its files when nothing goes wrong.
        seconds: That it takes then.
        calls: That write below the folder then.
        again: Options of a run after one that did not end well.
    """

    moeq: Server
    arguments: tuple[object, ...]
    folder: Path
    expected: dict[str, bytes]
    seconds: float
    calls: int
    again: tuple[str, ...]

    @classmethod
    def of(cls, moeq: Server, folder: Path, model: Path, *options: object) -> "Task":
        """Run it once without a fault."""
        (folder / "disk").mkdir()
        folder = folder / "disk"
        arguments = ("quantize", model, "-o", folder / "out", "--bits", 2.5, "--group-size", 32)
        begun = time.monotonic()
        done = moeq.run(*arguments, *options, fault=Fault(folder))
        assert done.status == 0, done.log
        seconds = time.monotonic() - begun
        expected = _files(folder / "out")
        shutil.rmtree(folder / "out")
        again = () if "none" in options else ("--resume",)  # without text all is done anew
        return cls(moeq, (*arguments, *options), folder, expected, seconds, done.calls, again)

    def resume(self, fault: Fault | None = None) -> Run:
        """Start it anew, or go on."""
        return self.moeq.start(*self.arguments, *self.again, fault=fault)

    def check_and_remove(self, done: Ended) -> None:
        """Check a run that has ended well: the same bytes, and nothing beside them."""
        assert done.status == 0, done.log
        assert _files(self.folder / "out") == self.expected
        assert [path.name for path in self.folder.iterdir()] == ["out"]
        shutil.rmtree(self.folder / "out")


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("mixtral")


@pytest.fixture
def measured(moeq: Server, model: Path, tmp_path: Path) -> Task:
    """A run that measures, calibrates and writes."""
    (tmp_path / "text.txt").write_text(TEXT)
    return Task.of(
        moeq, tmp_path, model, "--strategy", "sensitivity", "--dense-bits", 16, "--calib",
        tmp_path / "text.txt", "--nsamples", 4, "--seqlen", 32,
    )  # fmt: skip


@pytest.fixture
def data_free(moeq: Server, model: Path, tmp_path: Path) -> Task:
    """A run that only writes, in several files."""
    return Task.of(moeq, tmp_path, model, "--calib", "none", "--max-shard-size", "100KB")


def _stage(folder: Path) -> str:
    """Say what a run was about that has left a folder so."""
    unfinished = folder / ".out.moeq"
    if (folder / "out").exists() or not unfinished.exists():
        return "before or after everything"
    for stage, path in (("writing", "output"), ("calibrating", "calibration")):
        if (unfinished / path).exists():
            return stage
    return "measuring" if (unfinished / "plan").exists() else "starting"


@pytest.mark.parametrize("task", ["data_free", "measured"])
def test_runs_killed_at_random_moments_are_resumed(
    task: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    work: Task = request.getfixturevalue(task)
    drawn, stages = random.Random(0), Counter[str]()
    while stages.total() < FAULTS:
        run = work.resume()
        if run.has_ended(drawn.uniform(0, work.seconds)):
            work.check_and_remove(run.ended())
            continue
        run.kill()
        if run.ended().status == -signal.SIGKILL:
            stages[_stage(work.folder)] += 1
        if (work.folder / "out").exists():  # it appears as a whole, then the run cleans up
            assert _files(work.folder / "out") == work.expected
            shutil.rmtree(work.folder / "out")
    work.check_and_remove(work.resume().ended())
    record_property("kills", dict(stages))
    print(dict(stages))


def test_a_run_killed_while_it_removes_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    # Without its note of what it was for, a plan might be taken for that of other options.
    (plan := tmp_path / ".out.moeq" / "plan").mkdir(parents=True)
    for number in range(5):
        (plan / str(number)).touch()
    killed = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from moeq.checkpoint.workspace import Workspace

        removed = []
        def kill(event, arguments):
            if event == "os.remove":
                removed.append(arguments)
                if len(removed) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

        with Workspace.open(Path(sys.argv[1]), resume=True) as workspace:
            sys.addaudithook(kill)
            workspace.clear()
    """)
    command = [sys.executable, "-c", killed, str(tmp_path / "out")]
    assert subprocess.run(command, env=environment()).returncode == -signal.SIGKILL
    with Workspace.open(tmp_path / "out", resume=True) as workspace:
        assert not workspace.plan.exists()
    assert not any(tmp_path.iterdir())


def _numbers(calls: int) -> list[int]:
    """Return which of the calls are to fail: some from the first to the last, or all."""
    if FAULTS > FEW:
        return list(range(1, calls + 1))
    return [1 + number * (calls - 1) // (FAULTS - 1) for number in range(FAULTS)]


@pytest.mark.parametrize("task", ["data_free", "measured"])
def test_a_disk_that_fails_is_named_and_the_run_can_be_resumed(
    task: str, request: pytest.FixtureRequest
) -> None:
    work: Task = request.getfixturevalue(task)
    for turn, number in enumerate(_numbers(work.calls)):
        # A full disk stays full; one that fails may do so once.
        error, remedy, stays = (
            (errno.ENOSPC, "Make room there", True),
            (errno.EIO, "The disk has failed: check it", False),
        )[turn % 2]
        done = work.resume(Fault(work.folder, number, error, stays)).ended()
        where = f"{number} of {work.calls}: {done.failed}\n{done.log}"
        assert done.status == 1, where
        assert "Traceback" not in done.log, where
        assert os.strerror(error) in done.log, where
        assert str(work.folder) in done.log, where
        if "is complete, but" in done.log:
            assert _files(work.folder / "out") == work.expected
            shutil.rmtree(work.folder / "out")
        else:
            assert f"{remedy}, then " in done.log, where
            assert work.again or "--resume" not in done.log, where
            assert not (work.folder / "out").exists()
        work.check_and_remove(work.resume().ended())


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS])
def test_runs_exclude_each_other_where_the_file_system_has_no_locks(
    reason: int, data_free: Task
) -> None:
    no_locks = Fault(data_free.folder, flock=reason)
    owner = data_free.folder / ".out.moeq" / "owner.json"
    first = data_free.resume(no_locks)
    while not owner.exists() or not owner.read_text():
        assert not first.has_ended(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    second = data_free.resume(no_locks).ended()
    assert second.status == 1
    assert f"another `moeq quantize` is writing {data_free.folder / 'out'}" in second.log
    first.kill()
    assert first.ended().status == -signal.SIGKILL
    elsewhere = json.loads(owner.read_text())

    elsewhere["machine"][0] = "node7"
    mine = owner.read_text()
    owner.write_text(json.dumps(elsewhere))
    refused = data_free.resume(no_locks).ended()
    assert refused.status == 1
    assert "on node7. The file system has no locks" in refused.log
    assert f"remove {owner}" in refused.log
    owner.write_text(mine)  # of the run that was killed
    data_free.check_and_remove(data_free.resume(no_locks).ended())
