"""Work in this process: always one result, whoever does which part of it."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moeq.allocation import PlanOptions
from moeq.calibration import CalibrationConfig, calibrate
from moeq.checkpoint import SourceModel
from moeq.model.device import all_devices
from moeq.model.layerwise import LayerwiseModel
from moeq.planning import Measurement, measured_plan
from moeq.workers import OneByOne, Threads, Workers, on_devices
from support.models import NUM_EXPERTS, VOCABULARY
from vllm_moeq.format import BitPlan, LayerBits

CPU = torch.device("cpu")


def _slow_when_even(device: torch.device, shared: int, item: int) -> Iterator[tuple[int, str]]:
    time.sleep(0.02 * (item % 2 == 0))
    for part in range(item % 3):
        yield shared + 10 * item + part, str(device)


@pytest.mark.parametrize("workers", [OneByOne(CPU), Threads([CPU, CPU]), Threads([CPU] * 3)])
def test_results_come_in_the_order_of_the_items(workers: Workers) -> None:
    found = list(workers.flat_map(_slow_when_even, 1000, iter(range(9))))
    expected = [1000 + 10 * item + part for item in range(9) for part in range(item % 3)]
    assert [number for number, _ in found] == expected


def test_threads_are_not_far_ahead_of_those_who_take_results() -> None:
    """Else the results of all items would be in memory at once."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = Threads([CPU, CPU]).flat_map(_slow_when_even, 0, items())
    assert next(results) == (10, "cpu")  # item 0 has no results
    assert len(taken) <= 2 + 2 * 2
    assert next(results) == (20, "cpu")
    assert len(taken) <= 3 + 2 * 2
    results.close()
    assert len(taken) < 10


def _failing(device: torch.device, shared: None, item: int) -> Iterator[int]:
    if item == 3:
        raise ValueError("item 3")
    yield item


def test_an_error_ends_the_work() -> None:
    found = []
    with pytest.raises(ValueError, match="item 3"):
        for result in Threads([CPU, CPU]).flat_map(_failing, None, range(9)):
            found.append(result)
    assert found == [0, 1, 2]


def test_every_device_works() -> None:
    devices = [torch.device("meta"), CPU]
    found = list(Threads(devices).flat_map(_slow_when_even, 0, range(12)))
    assert {device for _, device in found} == {"meta", "cpu"}


def test_cuda_stands_for_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert all_devices(torch.device("cuda")) == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert all_devices(torch.device("cuda:1")) == [torch.device("cuda:1")]
    assert all_devices(CPU) == [CPU]
    assert on_devices([CPU]) == OneByOne(CPU)
    assert on_devices([CPU, CPU]) == Threads([CPU, CPU])
    counts = [workers.count for workers in (OneByOne(CPU), Threads([CPU] * 3))]
    assert counts == [1, 3]


def test_workers_on_a_device_share_its_cores() -> None:
    with _threads(5):
        assert on_devices([CPU], at_once=2) == Threads([CPU, CPU], cores=2)
        [seen] = set(on_devices([CPU], at_once=2).flat_map(_threads_of_torch, None, range(4)))
        assert (seen, torch.get_num_threads()) == (2, 5)
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 5


def _threads_of_torch(device: torch.device, shared: None, item: int) -> Iterator[int]:
    yield torch.get_num_threads()


def test_a_model_on_another_device_is_the_same_model(tiny_model: Callable[[str], Path]) -> None:
    model = LayerwiseModel(SourceModel.open(tiny_model("mixtral")), CPU)
    other = model.on(torch.device("cpu:0"))
    assert (model.on(CPU), model.device, other.device) == (model, CPU, torch.device("cpu:0"))
    assert other.source is model.source and other.on(CPU) is not model


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_two_devices_calibrate_to_the_bytes_of_one(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """And measure the same; each with one core, as one of them alone."""
    source = SourceModel.open(tiny_model("deepseek_v3"))
    bits = LayerBits((2, 3) * (NUM_EXPERTS // 2), (3, 2) * (NUM_EXPERTS // 2))
    plan = BitPlan(32, {layer.container: bits for layer in source.layers})
    tokens = torch.randint(VOCABULARY, (8, 48), generator=torch.Generator().manual_seed(0))
    config = CalibrationConfig(source, plan, tokens)
    options = PlanOptions(2.5, group_size=32, strategy="sensitivity")
    measurement = Measurement(source, options, tokens, "gptq", CPU)
    beside = Threads([CPU, torch.device("cpu:0")], cores=1)
    measured = []
    with _threads(1):
        for name, workers in (("one", OneByOne(CPU)), ("two", beside)):
            calibrate(config, tmp_path / name, resume=False, workers=workers)
            measured.append(measured_plan(measurement, workers=workers))
    assert measured[0] == measured[1]
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("one", "two")
    )
    assert one == two and len(one) == 4  # embeddings, two layers, and what comes behind them
