"""``moeq bench --tune``: the search, what is skipped, and that candidates compute the same."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeq.bench import Settings, Shape, Widths, tune
from moeq.bench.gpu import draw_calls
from moeq.bench.tune import Layer, Tuning, describe, why_not
from moeq.cli import main
from support.interpreter import triton_interpreter
from vllm_moeq.kernels.triton.tiles import Tiles, choose_tiles
from vllm_moeq.kernels.triton.tuned import read_tables, write_tables

SHAPE = Shape("tiny", 128, 128, 4, 2)


def _settings(tokens: str = "1,64") -> Settings:
    return Settings.parse(
        shape="128,128,4,2", bits="3/2", tokens=tokens, against="", group_size=64, threads=None,
        runs=3,
    )  # fmt: skip


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time of tiles be how far their fields are from those that are best."""
    best = {"block_m": 64, "block_n": 64, "num_warps": 8, "num_stages": 3, "group_m": 1}

    def time(tiles: Tiles) -> float:
        return 1.0 + sum(abs(getattr(tiles, name) / value - 1) for name, value in best.items())

    def share(layer: Any, candidate: Tiles, old: Tiles, calls: Any, runs: int) -> float:
        return time(candidate) / time(old)

    def problem(layer: Any, tiles: Tiles, call: Any) -> str | None:
        if tiles.num_warps == 2:
            return "spills"
        return "does not compile" if tiles.block_n == 32 else None

    monkeypatch.setattr(tune, "_share_of_time", share)
    monkeypatch.setattr(tune, "why_not", problem)


class _NoLayer:
    shape, device = SHAPE, torch.device("cpu")

    def kernels(self, candidates: Any, call: Any) -> set[Any]:
        return set()


@pytest.mark.usefixtures("cost")
def test_the_fastest_tiles_are_found_and_bad_ones_counted() -> None:
    found = tune.tune(_NoLayer(), _settings(), float("inf"))  # type: ignore[arg-type]
    assert [most for most, _ in found.table] == [0.5, float("inf")]
    for _, tiles in found.table:
        assert replace(tiles, programs_per_sm=2) == Tiles(64, 64, 8, 3, 1)
    assert set(found.skipped) == {"spills", "does not compile"}
    assert found.tried > 10
    built_in = choose_tiles(2, 4)
    assert built_in == Tiles(16, 64)
    # 64, 8 and 3 instead of 16, 4 and 4.
    assert found.speedups[1] == pytest.approx(1 + 0.75 + 0.5 + 1 / 3)
    text = "\n".join(describe(SHAPE, found))
    assert "spills" in text and f"up to 1 tokens: {found.table[0][1]}, 2.58 times" in text


def test_fields_that_pay_only_together_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an H100: 128 tokens need 8 warps, which are slower with fewer tokens."""

    def time(tiles: Tiles) -> float:
        many, warps = tiles.block_m >= 128, tiles.num_warps == 8
        return 0.5 if many and warps else 1.0 + many + warps

    monkeypatch.setattr(tune, "_share_of_time", lambda _, new, old, *__: time(new) / time(old))
    monkeypatch.setattr(tune, "why_not", lambda *_: None)
    found = tune.tune(_NoLayer(), _settings("4"), float("inf"))  # type: ignore[arg-type]
    ((_, tiles),) = found.table
    assert (tiles.block_m, tiles.num_warps) == (128, 8)


@pytest.mark.usefixtures("cost")
def test_after_the_deadline_nothing_is_tried() -> None:
    found = tune.tune(_NoLayer(), _settings(), 0.0)  # type: ignore[arg-type]
    assert [tiles for _, tiles in found.table] == [choose_tiles(2, 4), choose_tiles(128, 4)]
    assert (found.tried, found.skipped, found.speedups) == (0, {}, {1: 1.0, 64: 1.0})


def test_what_is_written_is_added_to_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("MOEQ_TILES", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(tune, "Layer", lambda *_: _NoLayer())
    table = ((float("inf"), Tiles(32, 64)),)
    monkeypatch.setattr(tune, "tune", lambda *_: Tuning(table, {1: 1.5}, 1, Counter()))
    other = ((float("inf"), Tiles(16, 64)),)
    write_tables(path, "a GPU", {"8,8,8": other})
    assert main(["bench", "--tune", "--shape", "128,128,4,2"]) == 0
    assert read_tables(path) == {"8,8,8": other, "128,128,4": table}
    assert f"wrote {path}" in capsys.readouterr().out
    path.write_text("{")
    assert main(["bench", "--tune", "--shape", "128,128,4,2"]) == 1
    assert f"moeq bench: --tune: {path}: cannot be read" in capsys.readouterr().err


def test_without_a_gpu_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--tune"]) == 1
    message = capsys.readouterr().err
    assert message == "moeq bench: --tune measures a CUDA GPU, and torch finds none here\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "2,3"], "argument --bits: --tune takes one width or one mix"),
        (["--against", "vllm"], "argument --against: has no effect with --tune"),
        (["--threads", "1"], "argument --threads: has no effect with --tune"),
        (["--json"], "argument --json: has no effect with --tune"),
        (["--bits", "5"], "argument --bits: width '5'"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--tune", *options])
    assert f"moeq bench: error: {message}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    with triton_interpreter() as pool:
        yield pool


def judge(tiles: Tiles, damaged: bool) -> str | None:
    """Run a candidate in the interpreter."""
    torch.manual_seed(0)
    layer = Layer(SHAPE, Widths((3, 2)), 64, torch.device("cpu"))
    if damaged:
        layer._copies[0].w13_packed.zero_()
    (call,) = draw_calls(
        SHAPE, 5, skewed=False, generator=torch.Generator().manual_seed(0), device=layer.device
    )
    return why_not(layer, tiles, call)


@pytest.mark.parametrize(
    ("tiles", "damaged", "reason"),
    [
        (Tiles(16, 32, programs_per_sm=8), False, None),
        (Tiles(32, 64, group_m=4), False, None),
        (Tiles(24, 64), False, "does not compile"),
        (Tiles(16, 64), True, "computes something else"),
    ],
    ids=str,
)
def test_candidates_are_compared_with_float64(
    interpreter: Executor, tiles: Tiles, damaged: bool, reason: str | None
) -> None:
    assert interpreter.submit(judge, tiles, damaged).result() == reason
