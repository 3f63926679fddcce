"""What a run leaves beside its output until it is done: never half-written, never shared."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError

from moeq.checkpoint.lock import locked
from moeq.checkpoint.reader import CheckpointReader
from moeq.errors import MoeqError
from vllm_moeq._version import __version__

_REMEDIES = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room there",
    errno.EIO: "The disk has failed: check it",
}
_OS_ERROR = re.compile(r"\b(?:code: |os error )(\d+)")
"""Matches what safetensors says of an error of the system."""
_REMOVED = ".removed"
"""Suffix of a folder that is being removed."""


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
        busy = f"another `moeq quantize` is writing {output}"
        with disk_errors(f"cannot write {folder}"), locked(folder, busy):
            with disk_errors(f"cannot remove what an earlier run left in {folder}"):
                for path in folder.glob(f"*{_REMOVED}"):
                    shutil.rmtree(path)
                workspace.clear(workspace.partial)
                if not resume:
                    workspace.clear()
                for path in folder.rglob("*"):  # half-written: ours, and those of safetensors
                    if path.suffix == ".unfinished" or path.name.startswith(".tmp"):
                        path.unlink()
            try:
                yield workspace
            finally:
                shutil.rmtree(workspace.partial, ignore_errors=True)
                for left in (workspace.plan, workspace.calibration):
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
            MoeqError: ``output`` has appeared meanwhile; or it is complete, but the disk has failed
                since.
            OSError: The disk fails before that.
        """
        _sync(self.partial)
        check_output_is_free(self.output)
        self.partial.rename(self.output)
        try:
            _sync_one(self.output.parent)
            self.clear()
        except OSError as error:
            raise MoeqError(
                f"{self.output} is complete, but the disk has failed since: {error}. Check it with "
                f"`moeq verify`, and remove {self.partial.parent}"
            ) from error

    def clear(self, *folders: Path) -> None:
        """Remove what an earlier run has left: in these folders, or else in all."""
        for folder in folders or (self.plan, self.calibration, self.partial):
            if folder.exists():
                remove(folder)


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
def disk_errors(failure: str, then: str = "run the command again") -> Iterator[None]:
    """Say what has failed when a disk is full or fails, and what to do.

    Args:
        failure: The first words of the message.
        then: What to do when the disk is in order.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = _REMEDIES.get(_errno(error) or 0, "Mend that")
        raise MoeqError(f"{failure}: {error}. {remedy}, then {then}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in errors of the system that do not: only opening it tells its name."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _errno(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = _OS_ERROR.search(str(error))
    return int(match[1]) if match else None


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


def remove(folder: Path) -> None:
    """Remove a folder of a workspace as a whole.

    Half of one, without the note of what it was for, might be taken for other work. What a kill
    leaves under the other name goes with the next run.
    """
    shutil.rmtree(folder.rename(folder.with_suffix(_REMOVED)))


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
        old = read_note(path)
        changed = [name for name in work if work[name] != old.get(name)]
        if changed:
            raise MoeqError(
                f"cannot resume: the unfinished run had another {', another '.join(changed)}; "
                "use the same options, or leave out `resume` to start again"
            )
    replace_file(path, lambda target: target.write_text(json.dumps(work)))


def read_note(path: Path) -> Any:
    """Return the JSON that an unfinished run has left.

    Raises:
        MoeqError: The file is damaged; names it.
        OSError: The disk fails.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise MoeqError(
            f"{path} of the unfinished run is damaged ({error}); leave out `resume` to start again"
        ) from error


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
    with writing(unfinished):
        write(unfinished)
        _sync_one(unfinished)
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
    with disk_errors(f"cannot write {path}"):
        try:
            partial.write_text(text, encoding="utf-8")
            os.link(partial, path)  # unlike a rename, this never replaces an existing file
        except FileExistsError:
            raise MoeqError(
                f"`{parameter}` {path} exists already; remove it or choose another"
            ) from None
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
        with writing(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
