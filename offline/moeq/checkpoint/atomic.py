"""Atomic writes: a file or folder is either complete or not there, and replaces none by mistake."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeq.checkpoint.disk_errors import disk_errors, named_in_errors
from moeq.errors import MoeqError


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


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is either complete or not there.

    Args:
        path: The file.
        write: Takes the path to write to.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    with named_in_errors(unfinished):
        write(unfinished)
        sync_file(unfinished)
        unfinished.replace(path)


def sync_folder(folder: Path) -> None:
    """Force a folder to disk, so that the rename cannot overtake what it contains."""
    for path in (*folder.rglob("*"), folder):
        sync_file(path)


def sync_file(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named_in_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
