"""The file of measured tiles: what is read, when, and what is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.experts import random_experts
from vllm_moeq.kernels import triton
from vllm_moeq.kernels.triton import tuned
from vllm_moeq.kernels.triton.tiles import TABLE, Tiles, choose_split, choose_tiles

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ROW = {
    "max_tokens_per_expert": None, "block_m": 32, "block_n": 64, "num_warps": 8, "num_stages": 3,
    "group_m": 2, "programs_per_sm": 4,
}  # fmt: skip
SHAPE = "128,128,2"
LIMIT = "max_tokens_per_expert"


@pytest.fixture(autouse=True)
def nothing_read_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MOEQ_TILES", raising=False)
    _forget()
    yield
    _forget()


def _forget() -> None:
    tuned.tuned_table.cache_clear()
    tuned._read_once.cache_clear()


def _file(path: Path, shapes: object, **changes: object) -> Path:
    path.write_text(json.dumps({"format": 2, "gpu": "any", "shapes": shapes} | changes))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    table = ((0.25, Tiles(16, 32, 2, 5, 3, 8)), (4.0, Tiles(32, 64)), (float("inf"), Tiles(64, 64)))
    tables = {SHAPE: table, "256,128,4": TABLE}
    path = tmp_path / "new" / "tiles.json"
    tuned.write_tables(path, "any", tables)
    assert tuned.read_tables(path) == tables
    assert list(path.parent.iterdir()) == [path]


def test_the_variable_names_the_file_and_it_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path / "tiles.json", {SHAPE: [ROW]})
    monkeypatch.setenv("MOEQ_TILES", str(path))
    tiles = Tiles(32, 64, 8, 3, 2, 4)
    assert tuned.tuned_table(CPU, 128, 128, 2) == ((float("inf"), tiles),)
    path.unlink()
    assert tuned.tuned_table(CPU, 128, 128, 2) == ((float("inf"), tiles),)
    assert tuned.tuned_table(CPU, 128, 128, 3) == TABLE


def test_tiles_of_another_gpu_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setenv("MOEQ_TILES", str(_file(tmp_path / "t.json", {SHAPE: [ROW]}, gpu="H100")))
    with pytest.raises(ValueError, match="measured on 'H100', this GPU is 'A100'"):
        tuned.tuned_table(GPU, 128, 128, 2)


def test_without_the_variable_the_file_of_this_gpu_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("MOEQ_CACHE_DIR", str(tmp_path))
    assert tuned.tuned_table(GPU, 128, 128, 2) == TABLE
    _forget()
    _file(
        tmp_path / "tiles-NVIDIA_H100_80GB_HBM3.json", {SHAPE: [ROW]}, gpu="NVIDIA H100 80GB HBM3"
    )
    assert tuned.tuned_table(GPU, 128, 128, 2)[0][1].num_warps == 8
    assert tuned.tuned_table(CPU, 128, 128, 2) == TABLE


def test_without_a_home_folder_the_built_in_tiles_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MOEQ_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    assert tuned.tuned_table(GPU, 128, 128, 2) == TABLE


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "cannot be read: .*No such file"),
    "cut off": (lambda path: path.write_text('{"format": 2,'), "cannot be read: Expecting"),
    "a list": (lambda path: path.write_text("[]"), "the file is no object"),
    "format": (lambda path: _file(path, {}, format=1), "is of format 1, this version reads 2"),
    "unknown field": (lambda path: _file(path, {}, note=""), r"unknown fields \['note'\]"),
    "missing field": (lambda path: path.write_text('{"format": 2}'), r"missing fields \['gpu'"),
    "shapes": (lambda path: _file(path, []), "shapes is no object"),
    "shape": (lambda path: _file(path, {"mixtral": [ROW]}), "shape 'mixtral' is no HIDDEN"),
    "no rows": (lambda path: _file(path, {SHAPE: []}), f"shape {SHAPE}: no list of rows"),
}


def _row(*rows: dict[str, Any]) -> Callable[[Path], object]:
    return lambda path: _file(path, {SHAPE: [ROW | row for row in rows]})


DAMAGES |= {
    "row": (_row({"warps": 4}), rf"shape {SHAPE}, row 0: .*unknown fields \['warps'\]"),
    "block_n": (_row({"block_n": 256}), r"row 0: block_n 256 is not one of \(32, 64, 128\)"),
    "block_m": (_row({LIMIT: 1}, {"block_m": 24}), "row 1: block_m 24 is not one of"),
    "warps": (_row({"num_warps": True}), "num_warps True is not one of"),
    "stages": (_row({"num_stages": 3.0}), r"num_stages 3\.0 is not one of"),
    "text": (_row({LIMIT: "few"}), f"{LIMIT} 'few' is no number"),
    "order": (_row({LIMIT: 2}, {LIMIT: 1}, {}), f"{LIMIT} must rise"),
    "end": (_row({LIMIT: 2}), f"{LIMIT} must rise, and be null in the last row only"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_stops_the_loading_of_a_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    path = tmp_path / "tiles.json"
    damage(path)
    monkeypatch.setenv("MOEQ_TILES", str(path))
    experts = random_experts([2, 3], [2, 3])
    with pytest.raises(ValueError, match=message) as caught:
        triton.prepare(experts.weights, experts.layout, "silu")
    assert str(caught.value).startswith(f"{path}: ")
    assert "moeq bench --tune" in str(caught.value)


def test_choices_per_expert_choose_the_row() -> None:
    table = ((0.5, Tiles(16, 32)), (2.0, Tiles(32, 32)), (float("inf"), Tiles(64, 32)))
    chosen = [choose_tiles(choices, 8, table).block_m for choices in (1, 4, 5, 16, 17, 1000)]
    assert chosen == [16, 16, 32, 32, 64, 64]


def test_split_gives_the_wanted_programs_work_but_not_too_little() -> None:
    assert [choose_split(programs, 112, 264) for programs in (32, 64, 264, 1000)] == [9, 5, 1, 1]
    assert choose_split(1, 8, 264) == 2  # each part has four blocks of columns
    assert choose_split(0, 3, 264) == 1
