"""Bad input, full disks and killed processes, all through the real ``moeq`` command."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moeq.cli import main
from support.checkpoints import (
    CONTAINERS,
    HIDDEN,
    INTERMEDIATE,
    mixtral_tensors,
    plan_dict,
    write_checkpoint,
)
from support.cli import INTERRUPTED, run_moeq, run_moeq_alone, start_moeq

pytestmark = pytest.mark.slow

W1 = f"{CONTAINERS[1]}.2.w1.weight"
SHARD = "model-00002-of-00002.safetensors"
PARTIAL = Path(".out.moeq") / "output"


def _without_expert(folder: Path) -> str:
    tensors = mixtral_tensors()
    del tensors[W1]
    write_checkpoint(folder, tensors)
    return f"{W1} is missing"


def _broken_promise(folder: Path) -> str:
    write_checkpoint(folder, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = SHARD
    path.write_text(json.dumps(index))
    return f"promises lm_head.weight in {SHARD}"


def _truncated_shard(folder: Path) -> str:
    write_checkpoint(folder, shards=2)
    os.truncate(folder / SHARD, 1000)
    return f"{SHARD} is truncated or damaged"


def _wrong_type(folder: Path) -> str:
    zeros = torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.int8)
    write_checkpoint(folder, mixtral_tensors() | {W1: zeros})
    return f"{W1} has type I8"


def _wrong_shape(folder: Path) -> str:
    write_checkpoint(folder, mixtral_tensors() | {W1: torch.zeros(INTERMEDIATE, 32)})
    return f"{W1} has shape [128, 32], expected [128, 64]"


def _dense_model(folder: Path) -> str:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return "model_type 'llama' in config.json is no supported"


def _quantized_model(folder: Path) -> str:
    write_checkpoint(folder, quantization_config={"quant_method": "gptq"})
    return "is quantized already (quant_method 'gptq'"


def _assert_clean_failure(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 1, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "damage",
    [
        _without_expert,
        _broken_promise,
        _truncated_shard,
        _wrong_type,
        _wrong_shape,
        _dense_model,
        _quantized_model,
    ],
)
def test_a_bad_model_is_refused(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    message = damage(tmp_path / "model")
    done = run_moeq(
        "quantize", tmp_path / "model", "-o", tmp_path / "out", "--bits", 2.5, "--group-size", 64,
        "--calib", "none",
    )  # fmt: skip
    _assert_clean_failure(done, message)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_dict(dict.fromkeys(CONTAINERS, [2] * 3)), "4 experts, the plan lists 3"),
        (plan_dict(dict.fromkeys(CONTAINERS, [7] * 4)), "width 7 of expert 0"),
        (plan_dict(format_version=2), "format_version 2 is not supported"),
        (plan_dict({"model.layers.0.mlp.experts": [2] * 4}), "plan belongs to another model"),
    ],
)
def test_a_bad_plan_is_refused(tmp_path: Path, plan: dict[str, object], message: str) -> None:
    write_checkpoint(tmp_path / "model")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = run_moeq(
        "quantize", tmp_path / "model", "-o", tmp_path / "out", "--plan", tmp_path / "plan.json",
        "--method", "rtn",
    )  # fmt: skip
    _assert_clean_failure(done, message)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "plan.json"}


def test_a_typo_does_not_remove_unfinished_work(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    unfinished = tmp_path / ".out.moeq" / "calibration"
    unfinished.mkdir(parents=True)
    (unfinished / "state.json").write_text("hours of work")
    too_large = ["--calib", "none", "--group-size", 128]
    for options in (["--plan", "typo.json", "--method", "rtn"], too_large):
        done = run_moeq("quantize", tmp_path / "model", "-o", tmp_path / "out", *options)
        assert done.returncode == 1  # the second: its rows are no multiple of 128
        assert (unfinished / "state.json").exists()


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    done = run_moeq("quantize", tmp_path / "model", "-o", tmp_path / "out", "--bits", 2)
    _assert_clean_failure(done, f"--output {tmp_path / 'out'} exists already")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_flipped_byte_fails_verification(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    out = tmp_path / "out"
    options = ["--bits=2", "--group-size=64", "--calib=none"]
    assert main(["quantize", f"{tmp_path}/model", "-o", f"{out}", *options]) == 0
    shard = out / "model-00001-of-00001.safetensors"
    with shard.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    _assert_clean_failure(run_moeq("verify", out), f"{shard.name} is damaged")


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 MB of experts: seconds of work, in many output files."""
    tensors = mixtral_tensors(experts=8, hidden=1024, intermediate=512)
    folder = tmp_path_factory.mktemp("big") / "model"
    return write_checkpoint(folder, tensors, hidden_size=1024, intermediate_size=512)


def _quantize(model: Path, folder: Path) -> list[object]:
    return [
        "quantize", model, "-o", folder / "out", "--bits", 2.5, "--strategy", "random:0",
        "--max-shard-size", "500KB", "--calib", "none",
    ]  # fmt: skip


@pytest.fixture
def writing(big: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A conversion to ``tmp_path / "out"`` that has written some files, but not all."""
    with _writing(big, tmp_path) as process:
        yield process
        process.kill()


def _writing(model: Path, folder: Path) -> subprocess.Popen[str]:
    process = start_moeq(*_quantize(model, folder))
    deadline = time.monotonic() + 60
    while len(list((folder / PARTIAL).glob("*.safetensors"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the conversion does not start"
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_a_killed_run_leaves_no_output_and_the_next_one_succeeds(
    writing: subprocess.Popen[str], big: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    assert not (tmp_path / "out").exists()
    for path in (tmp_path / "out", tmp_path / PARTIAL):
        assert main(["verify", str(path)]) == 1
        assert str(path) in capsys.readouterr().err
    assert (tmp_path / PARTIAL).is_dir()
    again = run_moeq(*_quantize(big, tmp_path))
    assert again.returncode == 0, again.stderr
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_stops_at_once_and_leaves_nothing(
    writing: subprocess.Popen[str], tmp_path: Path
) -> None:
    sent = time.monotonic()
    writing.send_signal(signal.SIGINT)
    _, errors = writing.communicate(timeout=30)
    assert time.monotonic() - sent < 5
    assert writing.returncode in INTERRUPTED
    assert "moeq quantize: interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_second_run_to_the_same_output_is_refused_and_the_first_completes(
    writing: subprocess.Popen[str], big: Path, tmp_path: Path
) -> None:
    writing.send_signal(signal.SIGSTOP)
    second = run_moeq(*_quantize(big, tmp_path))
    _assert_clean_failure(second, f"another `moeq quantize` is writing {tmp_path / 'out'}")
    writing.send_signal(signal.SIGCONT)
    _, errors = writing.communicate(timeout=60)
    assert writing.returncode == 0, errors
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_file_size_limit_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    done = run_moeq_alone(
        "quantize", tmp_path / "model", "-o", tmp_path / "out", "--bits", 2, "--group-size", 64,
        "--calib", "none",
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    _assert_clean_failure(done, f"cannot write {tmp_path / 'out'}")
    assert os.strerror(errno.EFBIG) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    done = run_moeq_alone(
        "plan", model, "--bits", "2.5", "--group-size", "32", "-o", tmp_path / "plan.json",
        "--calib", "none",
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )  # fmt: skip
    assert done.returncode == 1
    assert f"cannot write {tmp_path / 'plan.json'}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a file system of so many bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs root")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_too_small_a_disk_is_refused_before_work_starts(
    big: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(5_000_000)
    done = run_moeq(*_quantize(big, disk))
    _assert_clean_failure(done, f"{disk} has 5,001,216 bytes free")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("strategy", ["uniform", "sensitivity"])
def test_the_disk_that_dry_run_states_is_enough_also_to_resume(
    strategy: str,
    tiny_model: Callable[[str], Path],
    small_disk: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "text.txt").write_text("Bytes are tokens. " * 400)

    def command(output: Path, *more: str) -> tuple[object, ...]:
        return (
            "quantize", tiny_model("mixtral"), "-o", output, "--calib", tmp_path / "text.txt",
            "--bits=2", "--group-size=32", "--strategy", strategy, "--nsamples=32", "--seqlen=64",
            "--levels=3,2,1" if strategy == "sensitivity" else "--max-shard-size=1GB", *more,
        )  # fmt: skip

    stated = run_moeq(*command(tmp_path / "out", "--dry-run")).stdout
    result, on_the_way, *measuring = (
        int(size.replace(",", ""))
        for row in ("result", "calibrating", "measuring")
        for size in re.findall(rf"^{row} .*?([\d,]+) bytes", stated, re.MULTILINE)
    )
    needed = max(result + on_the_way, *measuring, 0)
    disk = small_disk(needed + 4096 * 20)  # room for the small files
    process = start_moeq(*command(disk / "out"))
    finished = "measurement/32/layer-00001.json" if measuring else "activations-00001.safetensors"
    while process.poll() is None and not list(disk.glob(f".out.*/*/{finished}")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert shutil.disk_usage(disk).free < needed
    done = run_moeq(*command(disk / "out", "--resume"))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in disk.iterdir()] == ["out"]


def test_a_disk_that_fills_up_is_named_and_leaves_nothing(
    big: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(30_000_000)
    with _writing(big, disk) as process:
        process.send_signal(signal.SIGSTOP)
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free))
        process.send_signal(signal.SIGCONT)
        output, errors = process.communicate(timeout=60)
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    _assert_clean_failure(done, f"cannot write {disk / 'out'}")
    assert os.strerror(errno.ENOSPC) in errors
    assert [path.name for path in disk.iterdir()] == ["other"]
