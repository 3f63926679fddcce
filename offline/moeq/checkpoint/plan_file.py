"""``plan.json``: a bit plan in a file of its own."""

import json
from pathlib import Path

from moeq.checkpoint.atomic import write_new_file
from moeq.checkpoint.reader import CheckpointReader, read_json
from moeq.checkpoint.verify import read_plan
from moeq.errors import MoeqError
from vllm_moeq.format import BitPlan, FormatError


def load_plan(path: Path) -> BitPlan:
    """Read ``plan.json``.

    Raises:
        MoeqError: The file is missing or no plan; names it.
    """
    try:
        return BitPlan.from_dict(read_json(path))
    except FormatError as error:
        raise MoeqError(f"{path}: {error}") from error


def plan_of(path: Path) -> BitPlan:
    """Return the plan in a file or in a packed checkpoint.

    Raises:
        MoeqError: It is neither; names it.
    """
    return read_plan(CheckpointReader(path)) if path.is_dir() else load_plan(path)


def write_plan(plan: BitPlan, path: Path) -> None:
    """Write ``plan.json``.

    Raises:
        MoeqError: The file exists or cannot be written.
    """
    write_new_file(path, json.dumps(plan.to_dict(), indent=2) + "\n", "output")
