"""Compilation in parallel, for a GPU that is not there: what was compiled is found in the cache."""

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from moeq.bench import Shape, Widths, tune
from moeq.bench.compiling import CompilerPool, compile_for
from moeq.bench.gpu import draw_calls
from moeq.bench.tune import Layer
from vllm_moeq.kernels import KERNELS
from vllm_moeq.kernels.triton.tiles import Tiles

pytestmark = pytest.mark.slow

SHAPE = Shape("tiny", 256, 128, 4, 2)
TILES = [Tiles(16, 64), Tiles(16, 128, num_stages=3), Tiles(32, 64)]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    """Start a process with an empty cache, which takes itself for one with an H100."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
            pool.submit(_pretend).result()
        yield pool


def _pretend() -> None:
    from triton.backends.compiler import GPUTarget

    compile_for(GPUTarget("cuda", 90, 32))


def _layer() -> tuple[Layer, Any]:
    """Make a layer for the Triton kernel on the CPU, and a call."""
    device = torch.device("cpu")
    triton = [kernel.name for kernel in KERNELS].index("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "select_kernel", lambda *_: triton)
        layer = Layer(SHAPE, Widths((3, 2)), 64, device)
    generator = torch.Generator().manual_seed(0)
    (call,) = draw_calls(SHAPE, 5, skewed=False, generator=generator, device=device)
    return layer, call


def compile_in_parallel() -> tuple[set[str], dict[str, bool]]:
    """Return names of the kernels of three candidates, and which of them this process then finds.

    Collecting compiles nothing, so all would be found only if the workers had compiled the same.
    """
    from triton import knobs

    layer, call = _layer()
    kernels = layer.kernels(TILES, call)
    cache = Path(knobs.cache.dir)
    assert not list(cache.rglob("*.cubin"))
    with CompilerPool(2) as pool:
        pool.compile(kernels)
        pool.compile(kernels)  # has nothing to do
    found: dict[str, bool] = {}

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        found[f"{src.name} {len(found)}"] = cache_hit

    knobs.compilation.listener = note
    for kernel in kernels:
        module = __import__(kernel.module, fromlist=[kernel.name])
        getattr(module, kernel.name).preload(kernel.specialization)
    return {kernel.name for kernel in kernels}, found


def test_workers_fill_the_cache_of_this_process(process: Executor) -> None:
    names, found = process.submit(compile_in_parallel).result()
    assert names == {"route_kernel", "sums_kernel", "w13_kernel", "w2_kernel", "combine_kernel"}
    products = [name for name in found if name.startswith(("w13", "w2"))]
    assert len(products) == 2 * len(TILES)
    assert all(found.values())


def launch_again() -> tuple[int, bool]:
    """Return how many kernels are collected of tiles that this process has compiled already."""
    from triton import JITFunction, knobs

    layer, call = _layer()
    before = JITFunction.run, knobs.runtime.jit_cache_hook
    count = len(layer.kernels(TILES[:1], call))
    return count, before == (JITFunction.run, knobs.runtime.jit_cache_hook)


def test_what_is_compiled_is_neither_collected_nor_launched(process: Executor) -> None:
    """A launch would fail: there is no GPU."""
    assert process.submit(launch_again).result() == (0, True)


def compile_what_cannot_be() -> int:
    layer, call = _layer()
    kernels = layer.kernels([Tiles(16, 64, num_warps=2), Tiles(24, 64)], call)
    with CompilerPool(1) as pool:
        pool.compile(kernels, deadline=0.0)
        assert not pool._seen
        pool.compile({kernel._replace(specialization="{}") for kernel in list(kernels)[:1]})
    return len(kernels)


def test_what_does_not_compile_is_left_to_who_launches_it(process: Executor) -> None:
    assert process.submit(compile_what_cannot_be).result() >= 2
