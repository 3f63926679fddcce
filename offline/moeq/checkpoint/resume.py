"""What an unfinished run was for: another one goes on with it only if it is for the same."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from moeq.checkpoint.atomic import replace_file
from moeq.checkpoint.reader import CheckpointReader
from moeq.errors import MoeqError
from vllm_moeq._version import __version__

REMOVED = ".removed"
"""Suffix of a folder that is being removed."""


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


def remove(folder: Path) -> None:
    """Remove a folder of a workspace as a whole.

    Half of one, without the note of what it was for, might be taken for other work. What a kill
    leaves under the other name goes with the next run.
    """
    shutil.rmtree(folder.rename(folder.with_suffix(REMOVED)))
