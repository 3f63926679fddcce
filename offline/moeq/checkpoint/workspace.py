"""What a run leaves beside its output until it is done: never half-written, never shared."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError

from moeq.checkpoint.reader import CheckpointReader
from moeq.errors import MoeqError
from vllm_moeq._version import __version__


@dataclass(frozen=True, slots=True)
class Workspace:
    """A hidden folder beside an output, for one run alone.

    Attributes:
        output: Folder to create.
        plan: What is finished of a measured plan.
        calibration: Layers that a calibration has finished.
        partial: The output, until it is complete.
    """

    output: Path
    plan: Path
    calibration: Path
    partial: Path

    @classmethod
    @contextmanager
    def open(cls, output: Path, resume: bool) -> Iterator["Workspace"]:
        """Keep other runs away from an output.

        Args:
            output: Folder to create.
            resume: Keep what an unfinished run has left; otherwise it is removed.

        Raises:
            MoeqError: ``output`` exists, another run is writing it, or its folder is not to be
                written.
        """
        check_output_is_free(output)
        folder = output.with_name(f".{output.name}.moeq")
        workspace = cls(output, folder / "plan", folder / "calibration", folder / "output")
        with _locked(folder, f"another `moeq quantize` is writing {output}"):
            if not resume:
                clear(folder)
            shutil.rmtree(workspace.partial, ignore_errors=True)
            try:
                yield workspace
            finally:
                shutil.rmtree(workspace.partial, ignore_errors=True)
                for left in (workspace.plan, workspace.calibration, folder):
                    with suppress(OSError):  # it is not empty: there is something to go on with
                        left.rmdir()

    def check_space(self, needed: int) -> None:
        """Check that the disk can take so many bytes.

        Raises:
            MoeqError: It cannot; says how much is missing.
        """
        # What an unfinished run left is either gone on with or removed.
        needed -= used_bytes(self.plan.parent)
        parent = self.output.parent
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise MoeqError(
                f"cannot write {self.output}: it takes {needed:,} bytes, {parent} has {free:,} "
                "bytes free"
            )

    def publish(self) -> None:
        """Make the output appear, all at once, and remove everything else.

        Raises:
            MoeqError: ``output`` has appeared meanwhile.
            OSError: The disk fails.
        """
        _sync(self.partial)
        check_output_is_free(self.output)
        self.partial.rename(self.output)
        _sync_one(self.output.parent)
        clear(self.partial.parent)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a hidden folder that becomes the output when the work in it is done.

    Args:
        output: Folder to create.

    Raises:
        MoeqError: ``output`` exists or cannot be written.
    """
    check_output_is_free(output)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    with disk_errors(f"cannot write {output}"):
        partial.mkdir()
    try:
        yield partial
        check_output_is_free(output)
        with disk_errors(f"cannot write {output}"):
            partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a folder for the time of a measurement, where TMPDIR says.

    Raises:
        MoeqError: There is none, or its disk is full or fails.
    """
    with (
        disk_errors("cannot measure in a temporary folder (TMPDIR names another place)"),
        TemporaryDirectory(prefix="moeq-") as name,
    ):
        yield Path(name)


@contextmanager
def disk_errors(failure: str) -> Iterator[None]:
    """Say what has failed when a disk is full or fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise MoeqError(f"{failure}: {error}") from error


def check_output_is_free(output: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        MoeqError: ``output`` exists, or the folder that it is to be in does not.
    """
    if os.path.lexists(output):
        raise MoeqError(f"`output` {output} exists already; remove it or choose another name")
    if not output.absolute().parent.is_dir():
        raise MoeqError(
            f"cannot write {output}: the folder {output.parent} of `output` does not exist; "
            "create it first"
        )


@contextmanager
def _locked(folder: Path, busy: str) -> Iterator[None]:
    """Create a folder if need be, and keep other runs out of it.

    The lock on the folder itself is freed by the system when the process dies, so a later run can
    tell the remains of a killed run from the work of a living one.

    Raises:
        MoeqError: Another run has it; the message is ``busy``. Or it cannot be created.
    """
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise MoeqError(f"cannot write {folder}: {error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MoeqError(busy) from None
        # The other run may have ended, and renamed this very folder, before we got the lock.
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise MoeqError(busy)
        yield
    finally:
        os.close(descriptor)


def clear(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def begin(path: Path, work: dict[str, Any]) -> None:
    """Note what work a folder is for, or check that it was begun for the same.

    Args:
        path: File of the note.
        work: Everything that the result depends on, by a name for users, as JSON.

    Raises:
        MoeqError: It was begun for something else; names what differs.
    """
    work = json.loads(json.dumps(work))
    if path.exists():
        old = json.loads(path.read_text())
        changed = [name for name in work if work[name] != old.get(name)]
        if changed:
            raise MoeqError(
                f"cannot resume: the unfinished run had another {', another '.join(changed)}; "
                "use the same options, or leave out `resume` to start again"
            )
    replace_file(path, lambda target: target.write_text(json.dumps(work)))


def fingerprint(reader: CheckpointReader, tokens: torch.Tensor, device: str) -> dict[str, Any]:
    """Return what results depend on: a model, a calibration text and a place."""
    return {
        "moeq version": __version__,
        "source": reader.file_stats(),
        "config.json": reader.config,
        "calibration text": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "device": device,
    }


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is either complete or not there.

    Args:
        path: The file.
        write: Takes the path to write to.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    write(unfinished)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def write_new_file(path: Path, text: str, parameter: str) -> None:
    """Write a file that was not there before, all or nothing.

    Args:
        path: The file.
        text: What it holds.
        parameter: That names it, for errors.

    Raises:
        MoeqError: The file exists or cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.link(partial, path)  # unlike a rename, this never replaces an existing file
    except FileExistsError:
        raise MoeqError(
            f"`{parameter}` {path} exists already; remove it or choose another"
        ) from None
    except OSError as error:
        raise MoeqError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def used_bytes(folder: Path) -> int:
    """Return the bytes that a folder takes on disk; 0 if it is not there."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*"))


def check_space(needed: int, folder: Path) -> None:
    """Check that a measurement has space in its folder; what is there already counts as free.

    Raises:
        MoeqError: It has not; says how much it takes.
    """
    needed -= used_bytes(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MoeqError(
            f"measuring takes {needed:,} bytes of temporary files, {folder.parent} has {free:,} "
            "bytes free; make room, or give fewer `nsamples`; `moeq plan` and `moeq compare` take "
            "the folder that TMPDIR names"
        )


def _sync(folder: Path) -> None:
    """Force a folder to disk, so that the rename cannot overtake what it contains."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
