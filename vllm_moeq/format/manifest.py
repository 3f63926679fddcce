"""``moeq_manifest.json``: every file of a checkpoint with its size and SHA-256."""

import hashlib
import json
from pathlib import Path

from vllm_moeq.format.errors import FormatError
from vllm_moeq.format.files import check_inside, read_object

MANIFEST_NAME = "moeq_manifest.json"
_VERSION = 1


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files below ``folder``.

    It is the last file that a conversion writes: a folder without it is not a checkpoint.
    """
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    text = json.dumps({"manifest_version": _VERSION, "files": files}, indent=1)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def check_manifest(folder: Path, *, weight_sizes_only: bool = False) -> list[str]:
    """Compare the files below ``folder`` with its manifest.

    Args:
        folder: A packed checkpoint.
        weight_sizes_only: Look at presence and size of the safetensors files only, which takes no
            time and lets people edit the model card or the chat template.

    Returns:
        One sentence for each file that is missing or differs; empty if all is well. Files that
        the manifest does not list are no problem: people add notes to their checkpoints.

    Raises:
        FormatError: There is no readable manifest.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = read_object(path)
        version, files = manifest["manifest_version"], manifest["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(
            f"{path} is missing: {folder} is not a finished moeq checkpoint. "
            "Run `moeq quantize` again"
        ) from None
    except (OSError, FormatError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is damaged ({error!r}): copy the checkpoint again") from error
    if version != _VERSION:
        raise FormatError(f"{path}: manifest_version {version!r} is not {_VERSION}")
    problems = []
    for name, (size, sha256) in expected.items():
        if weight_sizes_only and not name.endswith(".safetensors"):
            continue
        file = folder / check_inside(name, path)
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        elif not weight_sizes_only and _sha256(file) != sha256:
            problems.append(f"{name} is damaged: its SHA-256 differs from the manifest")
    return problems


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
