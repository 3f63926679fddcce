"""Checkpoints of true shapes have the tensors of real ones."""

import json
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
