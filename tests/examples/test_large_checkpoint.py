"""Checkpoints of true shapes have the tensors of real ones."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moeq import quantize, verify
from moeq.checkpoint import CheckpointReader

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """Import the script as it imports what lies beside it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import large_checkpoint

        yield large_checkpoint
    finally:
        sys.path.remove(str(BENCHMARKS))


def _as_tiny(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """Let the benchmark know a tiny model; return its number of layers."""
    config = json.loads((folder / "config.json").read_text())
    layers, model_type = config.pop("num_hidden_layers"), config.pop("model_type")
    monkeypatch.setitem(benchmark.CONFIGS, "tiny", (model_type, config))
    return int(layers)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_tensors_are_those_that_transformers_saves(
    family: str,
    benchmark: ModuleType,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = _as_tiny(benchmark, monkeypatch, tiny_model(family))
    _, parts = benchmark.parts_of("tiny", layers)
    found = {name: shape for part in parts.values() for name, (shape, _) in part.items()}
    saved = CheckpointReader(tiny_model(family)).tensors
    assert found == {name: info.shape for name, info in saved.items()}


def test_gpt_oss_is_written_in_mxfp4_and_can_be_packed(
    benchmark: ModuleType,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    layers = _as_tiny(benchmark, monkeypatch, tiny_model("gpt_oss"))
    size = benchmark.write_checkpoint("tiny", layers, tmp_path / "source")
    assert size == sum(
        info.num_bytes for info in CheckpointReader(tmp_path / "source").tensors.values()
    )
    packed = quantize(tmp_path / "source", tmp_path / "packed", bits=2, calib=None)
    assert verify(packed.path) == []


def test_rates_are_of_the_bytes_that_a_command_reads(benchmark: ModuleType) -> None:
    took = benchmark.Measured(
        seconds=30, cores=1.5, memory=2_000_000_000, private=500_000_000, read=3_000_000_000
    )
    row = benchmark.Step("verify", took).row(7)
    assert row == ["7 layers: verify", "3.00", "30.0", "6.00", "1.50", "2.00", "0.50"]


MB = 1_000_000
STANDS_IN = """#!/bin/sh
# moeq COMMAND SOURCE -o OUTPUT
case $1 in
plan) echo {} > "$4" && cat "$2/a.safetensors" ;;
quantize) mkdir "$4" && cat "$2"/*.safetensors | tail -c 2000000 > "$4/a.safetensors"
    cat "$2/b.safetensors" > "$4/again" ;;
verify) cat "$2/a.safetensors" ;;
esac
"""


def test_every_step_tells_what_it_read_from_the_disk(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The real commands take a minute to start; the benchmark itself runs them in earnest.
    (command := tmp_path / "moeq").write_text(STANDS_IN)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (source := tmp_path / "source").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (source / name).write_bytes(b"0" * 4 * MB)
    try:
        steps = [*benchmark.measure(source, tmp_path, "2.5", ["rtn", "hqq"])]
    except RuntimeError as error:
        assert "choose another --work" in str(error)
        pytest.skip(f"{tmp_path} is in memory")
    expected = {
        "plain read of the source": 8,
        "plan": 4,  # it does not need all files
        "quantize, rtn": 8,  # what it reads twice comes from the disk once
        "plain read of the result": 2,
        "verify": 2,
        "quantize, hqq": 8,
    }
    assert [step.name for step in steps] == [*expected]
    for step, size in zip(steps, expected.values(), strict=True):  # and a program or two
        assert 0 <= step.took.read - size * MB < 0.9 * MB, step
        assert step.took.seconds > 0


def test_files_that_no_disk_gives_are_refused(benchmark: ModuleType, tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.truncate(8 * MB)  # a hole: nothing of it is on the disk
    with pytest.raises(RuntimeError, match="came from no disk .*: choose another --work"):
        benchmark.plain_read("the source", tmp_path)
