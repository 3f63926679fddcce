"""JSON and names of files that somebody else wrote: checked before they are used."""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from vllm_moeq.format.errors import FormatError

LONGEST_NAME = 1024
"""Characters of the name of a tensor or layer, bytes of that of a file: ten times a real one's."""
_LONGEST_PART = 255
"""Bytes of the name of a file, or of a folder that it is in; more are an error of file systems."""
_DEEPEST = 64
"""Levels of objects within objects: fewer than what copying or comparing them can follow."""
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
"""Matches one half of a character beyond 16 bits; alone it is no text that can be written."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FormatError: It is no JSON object; names the file.
        OSError: It is missing or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        if _HALF_CHARACTER.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a ValueError
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path} must hold a JSON object")
    if _is_deep(data):
        raise FormatError(f"{path} is no file of a checkpoint: it is nested {_DEEPEST} levels deep")
    return data


def check_inside(name: Any, where: object) -> str:
    """Return the name of a file if it is one below the folder of the file that has it.

    Args:
        name: As the JSON has it.
        where: The file that has it, for messages.

    Raises:
        FormatError: It leads somewhere else, is no name, or is longer than one.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
        raise FormatError(
            f"{where} names the file {name!r}, which is not inside its folder: do not use this "
            "checkpoint"
        )
    sizes = [len(part.encode(errors="replace")) for part in (name, *parts)]
    if sizes[0] > LONGEST_NAME or max(sizes[1:]) > _LONGEST_PART:
        raise FormatError(
            f"{where} names the file {name[:40]!r}..., whose {sizes[0]} bytes are more than a name "
            "can have: do not use this checkpoint"
        )
    return str(name)


def check_name(name: str) -> None:
    """Check the length of the name of a tensor or layer.

    Raises:
        FormatError: It is too long for one.
    """
    if len(name) > LONGEST_NAME:
        raise FormatError(
            f"{name[:40]}... has {len(name)} characters, more than the name of a tensor or layer "
            "can have"
        )


def _is_deep(data: Any) -> bool:
    level = [data]
    for _ in range(_DEEPEST):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
