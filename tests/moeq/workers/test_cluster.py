"""Work on a Ray cluster of several nodes, of which some are killed."""

import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from moeq.errors import MoeqError
from moeq.workers import Cluster, connected
from moeq.workers.cluster import Node, _bytes, _owned, check
from support.cli import run_moeq, start_moeq

if TYPE_CHECKING:
    from support.ray_cluster import Nodes

HERE = Node({"model.safetensors": 1000}, {"torch": "2.13.0", "instruction set": "AVX2"})
TEXT = "".join(f"Line {i} of a text whose bytes are tokens, {i * i % 97}.\n" for i in range(400))
OPTIONS = ("--bits", 2.5, "--group-size", 32, "--nsamples", 24, "--seqlen", 48)


@pytest.fixture(scope="module")
def nodes() -> Iterator["Nodes"]:
    from support.ray_cluster import nodes

    with nodes(3) as found:
        yield found


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_the_time_told_is_that_of_the_cluster(
    nodes: "Nodes", tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    command = (
        "quantize", tiny_model("mixtral"), "-o", tmp_path / "out", "--group-size", 32, "--dry-run",
        "--json",
    )  # fmt: skip
    told = {}
    for options in ((), ("--ray", nodes.address)):
        done = run_moeq(*command, *options)
        assert done.returncode == 0, done.stderr
        estimate = json.loads(done.stdout)["estimate"]
        told[estimate["workers"]] = estimate["measuring"]["seconds"]
    here, cluster = told
    assert cluster == 3
    assert here < cluster and told[cluster] < told[here]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_with_the_same_cluster(
    nodes: "Nodes", tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Killed while workers measure, and again while they round."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = (
        "quantize", tiny_model("qwen2_moe"), *OPTIONS, "--strategy", "sensitivity", "--calib", text,
    )  # fmt: skip
    alone = run_moeq(*command, "-o", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    on_cluster = *command, "-o", tmp_path / "cluster", "--ray", nodes.address, "--resume"
    work = tmp_path / ".cluster.moeq"
    for begun in ("plan/measurement/32/layer-00001.json", "calibration/activations-00001"):
        process = start_moeq(*on_cluster)
        while process.poll() is None and not list(work.glob(f"{begun}*")):
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "cluster").exists()
    done = run_moeq(*on_cluster)
    assert done.returncode == 0, done.stderr
    assert _files(tmp_path / "cluster") == _files(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [("rtn", "--strategy", "random:0"), ("gptq", "--strategy", "sensitivity", "--dense-bits", 8)],
    ids=lambda method: method[0],
)
def test_bytes_are_those_of_a_single_process(
    method: tuple[object, ...],
    nodes: "Nodes",
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Also if a node is killed on the way."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    name, ray = method[0], ("--ray", nodes.address)
    calibration = ("--calib", text, *OPTIONS[4:]) if name == "gptq" else ("--calib", "none")
    command = ("quantize", tiny_model("qwen2_moe"), *OPTIONS[:4], "--method", *method, *calibration)
    alone = run_moeq(*command, "-o", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    process = start_moeq(*command, "-o", tmp_path / "cluster", *ray)
    if name == "gptq":
        measured = tmp_path / ".cluster.moeq" / "plan" / "measurement" / "32" / "layer-00001.json"
        while process.poll() is None and not measured.exists():
            time.sleep(0.002)
        nodes.kill(nodes.mortal[0])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    if name == "gptq":
        assert " with 3 workers; " in errors
    assert _files(tmp_path / "cluster") == _files(tmp_path / "alone")


def _doubled(device: torch.device, shared: Path, item: int) -> Iterator[torch.Tensor]:
    """Say where an item begins; all but the first wait until they may end."""
    import ray

    (shared / f"{item} {ray.get_runtime_context().get_node_id()}").touch()
    while item and not (shared / "go").exists():
        time.sleep(0.02)
    yield torch.full((3,), 2 * item, dtype=torch.bfloat16)


def _failing(device: torch.device, shared: None, item: int) -> Iterator[int]:
    if item == 3:
        raise MoeqError("tensor x is not finite")
    yield item


@pytest.mark.slow
def test_the_work_of_a_killed_node_is_done_again(
    nodes: "Nodes", tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    with connected(nodes.address, tiny_model("mixtral")):
        results = Cluster("cpu").flat_map(_doubled, tmp_path, range(9))
        found = [next(results)]
        lost: list[list[str]] = []
        while not lost:
            begun = [path.name.split() for path in tmp_path.iterdir()]
            lost = [[item, node] for item, node in begun if item != "0" and node in nodes.mortal]
        nodes.kill(lost[0][1])
        (tmp_path / "go").touch()
        found += results
        with pytest.raises(MoeqError, match=r"^tensor x is not finite$"):
            list(Cluster("cpu").flat_map(_failing, None, range(9)))
        with pytest.raises(MoeqError, match="no node of the Ray cluster has 64 cores"):
            Cluster("cpu", 64)
        with pytest.raises(MoeqError, match="1 cores .* and 9,000,000,000,000 bytes of memory"):
            Cluster("cpu", 1, 9 * 10**12)
    assert torch.equal(torch.stack(found).float(), 2 * torch.arange(9.0)[:, None].expand(9, 3))
    assert len(list(tmp_path.glob(f"{lost[0][0]} *"))) == 2  # on another node again


def test_a_node_that_cannot_give_the_same_bytes_is_named(caplog: pytest.LogCaptureFixture) -> None:
    check(HERE, {"a": HERE})
    with pytest.raises(MoeqError, match=r"node b of .* lacks vllm-moeq .* \(it has 0\.0\.1\)"):
        check(HERE, {"a": HERE, "b": "it has 0.0.1"})
    for files in ({}, {"model.safetensors": 1001}):
        with pytest.raises(MoeqError, match="node c of .* a folder that all nodes share"):
            check(HERE, {"c": HERE._replace(files=files)})
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check(HERE, {"d": HERE._replace(others=HERE.others | {"instruction set": "AVX512"})})
    assert "node d of the Ray cluster has instruction set AVX512, this machine AVX2" in caplog.text


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "cannot be reached"),
        ("ray://127.0.0.1:10001", "run moeq on one of its nodes"),
        ("nonsense:port", "cannot be reached"),
    ],
)
def test_a_cluster_out_of_reach_is_named(
    address: str, reason: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    done = run_moeq(
        "quantize", tiny_model("mixtral"), "-o", tmp_path / "out", "--calib", "none",
        "--ray", address,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"`ray` {address}".replace("`ray`", "--ray") in done.stderr and reason in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.empty(0, 4, dtype=torch.bfloat16),
        torch.arange(6).view(2, 3).T,
        torch.linspace(0, 1, 8, dtype=torch.float16)[::2],
    ],
    ids=str,
)
def test_tensors_travel_as_bytes(tensor: torch.Tensor) -> None:
    sent = _bytes(tensor)
    sent[0].setflags(write=False)  # as Ray gives it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        received = _owned(sent)
    assert (received.dtype, received.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(received, tensor)


def test_ray_is_asked_for_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MoeqError, match=r"pip install 'vllm-moeq\[ray\]'"),
        connected("auto", tmp_path),
    ):
        pass
