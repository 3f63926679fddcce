"""The manifest: what it records, and each way in which a folder can differ from it."""

import hashlib
import json
from pathlib import Path

import pytest

from vllm_moeq.format import MANIFEST_NAME, FormatError, check_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"\x00weights")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.txt").write_text("notes")
    write_manifest(tmp_path)
    return tmp_path


def test_every_file_is_listed_with_size_and_hash(folder: Path) -> None:
    files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    expected = {"model.safetensors": b"\x00weights", "sub/notes.txt": b"notes"}
    assert files == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in expected.items()
    }


@pytest.mark.parametrize("weight_sizes_only", [True, False])
def test_an_unchanged_folder_has_no_problem(folder: Path, weight_sizes_only: bool) -> None:
    (folder / "later.txt").write_text("not listed")
    assert check_manifest(folder, weight_sizes_only=weight_sizes_only) == []


def test_writing_again_gives_the_same_manifest(folder: Path) -> None:
    before = (folder / MANIFEST_NAME).read_bytes()
    write_manifest(folder)
    assert (folder / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize("weight_sizes_only", [True, False])
def test_a_missing_file_is_named(folder: Path, weight_sizes_only: bool) -> None:
    (folder / "model.safetensors").unlink()
    assert check_manifest(folder, weight_sizes_only=weight_sizes_only) == [
        "model.safetensors is missing"
    ]


def test_an_edited_note_is_a_problem_of_full_checks_only(folder: Path) -> None:
    (folder / "sub" / "notes.txt").write_text("more notes")
    assert check_manifest(folder, weight_sizes_only=True) == []
    assert check_manifest(folder) == ["sub/notes.txt has 10 bytes instead of 5"]


@pytest.mark.parametrize("weight_sizes_only", [True, False])
def test_another_size_is_named(folder: Path, weight_sizes_only: bool) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00wei")
    assert check_manifest(folder, weight_sizes_only=weight_sizes_only) == [
        "model.safetensors has 4 bytes instead of 8"
    ]


def test_other_contents_of_the_same_size_are_named_if_hashes_are_compared(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x01weights")
    assert check_manifest(folder, weight_sizes_only=True) == []
    assert check_manifest(folder) == [
        "model.safetensors is damaged: its SHA-256 differs from the manifest"
    ]


def test_all_problems_are_reported(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "sub" / "notes.txt").unlink()
    assert len(check_manifest(folder)) == 2


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"{MANIFEST_NAME} is missing.*not a finished"):
        check_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", '{"manifest_version": 1}', "\udcff",
        '{"manifest_version": 1, "files": []}', '{"manifest_version": 1, "files": {"a": 1}}',
        '{"manifest_version": 1, "files": {"a": {"size": 1}}}',
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_named(folder: Path, text: str) -> None:
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(FormatError, match=f"{MANIFEST_NAME} is damaged"):
        check_manifest(folder)


def test_an_unknown_version_is_named(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text('{"manifest_version": 2, "files": {}}')
    with pytest.raises(FormatError, match="manifest_version 2 is not 1"):
        check_manifest(folder)
