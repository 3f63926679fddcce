"""Tiles that ``moeq bench --tune`` measured on this GPU, in a JSON file.

``{"format": 2, "gpu": NAME, "shapes": {"HIDDEN,INTERMEDIATE,EXPERTS": [ROW, ...]}}``, where a row
has the fields of ``Tiles`` and ``max_tokens_per_expert``: the mean number up to which it is used
(null: any).
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vllm_moeq import envs
from vllm_moeq.kernels.triton.tiles import TABLE, Table, Tiles

_FORMAT = 2  # 1 had other names for three fields
_LIMIT = "max_tokens_per_expert"
_ALLOWED = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128),  # rows of weights are padded to 128
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": tuple(range(1, 9)),
    "group_m": tuple(range(1, 65)),
    "programs_per_sm": tuple(range(1, 65)),
}
_NAMES = [field.name for field in fields(Tiles)]


@cache
def tuned_table(
    device: torch.device, hidden_size: int, intermediate_size: int, experts: int
) -> Table:
    """Return the tiles measured for a layer on a GPU, else the built-in ones.

    Reads a file with the first call only.

    Args:
        device: Where the layer runs.
        hidden_size: Columns of w13.
        intermediate_size: Columns of w2 on this rank.
        experts: Those on this rank.

    Raises:
        ValueError: The file that ``MOEQ_TILES`` names cannot be read, or a file is damaged.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    shapes = _read_once(_file(device), gpu)
    return shapes.get(shape_key(hidden_size, intermediate_size, experts), TABLE)


def shape_key(hidden_size: int, intermediate_size: int, experts: int) -> str:
    """Return what the file calls a layer."""
    return f"{hidden_size},{intermediate_size},{experts}"


def default_file(gpu: str) -> Path:
    """Return the file in the cache for a GPU's name; it need not exist.

    Raises:
        FileNotFoundError: There is no cache folder.
    """
    return envs.cache_dir() / f"tiles-{re.sub(r'[^A-Za-z0-9]+', '_', gpu)}.json"


def read_tables(path: Path, gpu: str | None = None) -> dict[str, Table]:
    """Read a file of tiles: tables by :func:`shape_key`.

    Args:
        path: The file.
        gpu: Name of the GPU that they are for; None does not ask.

    Raises:
        ValueError: It cannot be read, does not follow the format, or is of another GPU; names the
            file and the place.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read: {error}; write it anew with moeq bench --tune, or remove it"
        ) from error
    try:
        _check_fields(content, ("format", "gpu", "shapes"), "the file")
        if content["format"] != _FORMAT:
            raise ValueError(f"is of format {content['format']!r}, this version reads {_FORMAT}")
        if gpu is not None and content["gpu"] != gpu:
            raise ValueError(f"measured on {content['gpu']!r}, this GPU is {gpu!r}")
        if not isinstance(content["shapes"], dict):
            raise ValueError("shapes is no object")
        return {shape: _table(shape, rows) for shape, rows in content["shapes"].items()}
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; write it anew with moeq bench --tune, or remove it"
        ) from error


def write_tables(path: Path, gpu: str, tables: Mapping[str, Table]) -> None:
    """Write a file of tiles; whoever reads it meanwhile gets the old one or the new one."""
    shapes = {
        shape: [
            {_LIMIT: None if limit == float("inf") else limit} | asdict(tiles)
            for limit, tiles in table
        ]
        for shape, table in tables.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    content = {"format": _FORMAT, "gpu": gpu, "shapes": shapes}
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


@cache
def _read_once(path: Path | None, gpu: str | None) -> dict[str, Table]:
    return {} if path is None else read_tables(path, gpu)


def _file(device: torch.device) -> Path | None:
    chosen = envs.tiles()
    if chosen:
        return chosen
    if device.type != "cuda":
        return None
    try:
        path = default_file(torch.cuda.get_device_name(device))
    except FileNotFoundError:  # there is no home folder, so there is no file
        return None
    return path if path.exists() else None


def _table(shape: str, rows: Any) -> Table:
    if not re.fullmatch(r"\d+,\d+,\d+", shape):
        raise ValueError(f"shape {shape!r} is no HIDDEN,INTERMEDIATE,EXPERTS")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"shape {shape}: no list of rows")
    table = []
    for number, row in enumerate(rows):
        place = f"shape {shape}, row {number}"
        _check_fields(row, (_LIMIT, *_NAMES), place)
        for name in _NAMES:
            if type(row[name]) is not int or row[name] not in _ALLOWED[name]:
                raise ValueError(f"{place}: {name} {row[name]!r} is not one of {_ALLOWED[name]}")
        limit = float("inf") if row[_LIMIT] is None else row[_LIMIT]
        if type(limit) not in (int, float):
            raise ValueError(f"{place}: {_LIMIT} {limit!r} is no number")
        table.append((float(limit), Tiles(**{name: row[name] for name in _NAMES})))
    limits = [limit for limit, _ in table]
    if limits != sorted(set(limits)) or limits[-1] != float("inf"):
        raise ValueError(f"shape {shape}: {_LIMIT} must rise, and be null in the last row only")
    return tuple(table)


def _check_fields(fields: Any, names: tuple[str, ...], place: str) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{place} is no object")
    missing, unknown = set(names) - fields.keys(), fields.keys() - set(names)
    if missing or unknown:
        raise ValueError(
            f"{place}: missing fields {sorted(missing)}, unknown fields {sorted(unknown)}"
        )
