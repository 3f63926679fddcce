"""The parts of the GPU benchmark that need no GPU: bytes, errors, routing, the order of runs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moeq.bench import Shape, Widths
from moeq.bench.contenders import expert_bytes
from moeq.bench.gpu import (
    DECODE_CALLS,
    PREFILL_CALLS,
    Figures,
    GpuContender,
    copies,
    draw_calls,
    figures,
    layout_of,
    matrices,
    moeq_contender,
    moved_bytes,
    relative_error,
    replay,
    time_interleaved,
)
from support.experts import random_experts
from vllm_moeq.kernels import KERNELS

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 256, 128, 4, 2)
MIX = Widths((3, 2))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def contender() -> GpuContender:
    torch.manual_seed(0)
    return moeq_contender("ours", SHAPE, MIX, 64, len(KERNELS) - 1, CPU)


def test_error_is_that_of_the_output(contender: GpuContender) -> None:
    (call,) = draw_calls(SHAPE, 70, skewed=False, generator=_generator(), device=CPU)
    assert 1e-4 < relative_error(contender, call) < 5e-3  # rounding to bfloat16
    twice = replace(contender, run=lambda *call: 2 * contender.run(*call))
    assert relative_error(twice, call) == pytest.approx(1, abs=0.01)

    def swapped(copy: int, x: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return contender.run(copy, x, w, ids.flip(-1))

    assert relative_error(replace(contender, run=swapped), call) > 0.1


def test_matrices_are_the_weights() -> None:
    experts = random_experts([1, 2, 3, 8], [8, 3, 2, 1], 64, hidden=256, intermediate=128)
    of = matrices(experts.layout, experts.weights)
    for expert in range(4):
        w13, w2 = of(expert)
        torch.testing.assert_close(w13, experts.w13[expert])
        torch.testing.assert_close(w2, experts.w2[expert])


def test_bytes_are_those_of_touched_experts_and_activations(contender: GpuContender) -> None:
    matrix = 256 * 128
    assert contender.expert_bytes == expert_bytes(layout_of(SHAPE, MIX, 64))
    assert contender.expert_bytes[:2] == tuple(3 * matrix * (b * 64 + 24) // 512 for b in (3, 2))
    x, router = torch.zeros(3, 256), torch.zeros(3, 2)
    calls = [
        (x, router, torch.tensor([[0, 1], [1, 0], [0, 1]])),
        (x, router, torch.tensor([[0, 1], [2, 3], [0, 1]])),
    ]
    three, two = contender.expert_bytes[:2]
    # Two bytes each: x and the output of 6 choices, gate and up, and what is between.
    activations = 2 * (3 * 256 + 6 * (256 + 128 + 256))
    assert moved_bytes(contender, SHAPE, calls) == (three + two) * 1.5 + activations


def test_share_of_the_floor_and_quartiles() -> None:
    found = figures([4e-3, 1e-3, 2e-3, 3e-3, 9e-3], calls=10, read_bytes=6e5, error=0.5)
    assert found == Figures(us=300, us_iqr=200, read_bytes=6e5, error=0.5)
    assert found.floor_share(4e9) == pytest.approx(0.5)  # 150 of 300 microseconds


@pytest.mark.parametrize("skewed", [False, True])
def test_routing(skewed: bool) -> None:
    shape = Shape("many", 8, 8, 64, 8)
    ((x, router, ids),) = draw_calls(shape, 2000, skewed=skewed, generator=_generator(), device=CPU)
    assert (x.dtype, router.dtype, ids.dtype) == (torch.bfloat16, torch.float32, torch.int32)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    torch.testing.assert_close(router.sum(-1), torch.ones(2000))
    counts = ids.flatten().bincount(minlength=64)
    assert (counts[0] / counts[-1] > 5) == skewed
    assert counts.min() > 0


def test_copies_together_are_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpu = torch.device("cuda")
    assert [copies(size << 20, gpu) for size in (10, 50, 199, 200, 500)] == [20, 4, 2, 1, 1]
    assert DECODE_CALLS >= 4 and PREFILL_CALLS >= 4
    assert copies(1, CPU) == 1


def test_a_replay_takes_turns_among_copies() -> None:
    order: list[tuple[int, int]] = []
    empty = torch.empty(0)

    def run(copy: int, x: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        order.append((copy, len(x)))
        return x

    calls = [(torch.zeros(tokens, 8), torch.zeros(1), torch.zeros(1)) for tokens in range(1, 5)]
    with replay(GpuContender("", (1,), 3, run, lambda expert: (empty, empty)), calls) as run_all:
        assert not order
        run_all()
    assert order == [(0, 1), (1, 2), (2, 3), (0, 4)]


def test_runs_start_with_another_one_each_time() -> None:
    events: list[str] = []

    def replayed(name: str) -> Callable[[], None]:
        return lambda: events.append(name)

    seconds = time_interleaved([replayed(name) for name in "abc"], 4, CPU)
    assert "".join(events) == "abcbcacababc"
    assert [len(times) for times in seconds] == [4, 4, 4]
    assert all(time > 0 for times in seconds for time in times)
