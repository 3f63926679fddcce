"""Calibrated rounding through the real ``moeq`` command."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from moeq.rounding import round_linear
from support.cli import environment, run_moeq, start_moeq
from support.models import save_tokenizer
from support.reference import dequantize_checkpoint

pytestmark = pytest.mark.slow

TEXT = "".join(f"Line {i} of a text whose bytes are tokens, {i * i % 97}.\n" for i in range(400))
OPTIONS = (
    "--bits", 2.5, "--group-size", 32, "--strategy", "combined", "--nsamples", 24, "--seqlen", 48,
)  # fmt: skip
UNFINISHED = Path(".out.moeq") / "calibration"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _copy(source: Path, target: Path, **changes: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Copy a checkpoint; change tensors whose name ends as a key says, dots as underlines."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for ending, change in changes.items():
        for name in tensors:
            if name.replace(".", "_").endswith(ending):
                tensors[name] = change(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_outputs_stay_nearer_to_the_original_than_without_calibration(
    family: str, tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    def correlate(embedding: torch.Tensor) -> torch.Tensor:
        """Leave few directions, as training does; without any, no rounding beats the nearest."""
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(8, embedding.shape[1], generator=generator)
        places = torch.randn(embedding.shape[0], 8, generator=generator)
        return (places @ basis).to(embedding.dtype)

    source = _copy(tiny_model(family), tmp_path / "model", embed_tokens_weight=correlate)
    tokens = torch.tensor([list(TEXT[:200].encode())]) + 3
    logits = {}
    for method in ("gptq", "rtn"):
        out = tmp_path / method
        calibration = ("--calib", text, *OPTIONS[6:]) if method == "gptq" else ("--calib", "none")
        done = run_moeq(
            "quantize", source, "-o", out, *OPTIONS[:6], "--method", method, *calibration
        )
        assert done.returncode == 0, done.stderr
        assert run_moeq("verify", out).returncode == 0
        dequantize_checkpoint(out, tmp_path / f"{method}-float")
        logits[method] = _logits(tmp_path / f"{method}-float", tokens)
    original = _logits(source, tokens)
    errors = {name: (found - original).norm() for name, found in logits.items()}
    assert errors["gptq"] < 0.95 * errors["rtn"]
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    note = config["quantization_config"]["provenance"]["details"]["rounding"]
    assert note == "gptq, 24 x 48 tokens of text.txt, seed 0"
    _check_coverage(json.loads((tmp_path / "gptq" / "moeq_calibration.json").read_text()))


def test_dense_layers_keep_their_outputs_behind_rounded_ones(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source = tiny_model("deepseek_v3")  # its first layer has no experts
    out, twin = tmp_path / "out", tmp_path / "float"
    options = ("--calib", text, *OPTIONS[:6], "--nsamples=48", "--seqlen=64", "--dense-bits=4")
    done = run_moeq("quantize", source, "-o", out, *options, "--quantize-embeddings")
    assert done.returncode == 0, done.stderr
    assert run_moeq("verify", out).returncode == 0
    dequantize_checkpoint(out, twin)
    linear = json.loads((out / "config.json").read_text())["quantization_config"]["linear"]
    targets = linear["config_groups"]["group_0"]["targets"]
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (source, twin)
    ]
    modules = [dict(model.named_modules()) for model in models]
    inputs: dict[str, torch.Tensor] = {}
    looked_up = "model.embed_tokens"
    targets.remove(looked_up)
    for name in targets:
        modules[1][name].register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2).double())
        )
    with torch.inference_mode():
        ids = AutoTokenizer.from_pretrained(source)(TEXT[:2048])["input_ids"]
        models[1](torch.tensor(ids).view(-1, 64))
    better = 0
    for name in targets:
        original, rounded = (model[name].weight.detach().double() for model in modules)
        nearest = round_linear(original.float(), 4, 32).dequantize(4).double()
        errors = [((w - original) @ inputs[name].T).norm() for w in (rounded, nearest)]
        better += bool(errors[0] < 0.9 * errors[1])
    assert len(targets) == 15 and better >= 13, (better, len(targets))
    assert "lm_head" in targets
    rows, rounded = (model[looked_up].weight.detach() for model in modules)
    torch.testing.assert_close(rounded, round_linear(rows, 4, 32).dequantize(4))


def _check_coverage(summary: dict[str, Any]) -> None:
    """Every token goes to two experts of each layer, and their router weights make up a sum."""
    assert summary["tokens"] == 24 * 48
    for coverage in summary["experts"].values():
        assert sum(coverage["tokens"]) == 2 * 24 * 48
        assert all(
            0 <= weight <= tokens
            for weight, tokens in zip(coverage["weight"], coverage["tokens"], strict=True)
        )


def _logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(tokens).logits


def test_experts_that_few_tokens_reach_are_counted(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source = tiny_model("qwen3_moe")
    out = tmp_path / "out"
    done = run_moeq("quantize", source, "-o", out, "--calib", text, *OPTIONS[:6], "--nsamples=1",
                    "--seqlen=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Two tokens make four choices: some of the eight experts of a layer get none.
    assert "16 of 16 experts got fewer than 32 calibration tokens" in done.stdout
    for path in out.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.isfinite(tensor.float()).all(), name


def test_every_expert_can_be_rounded_by_all_tokens(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """Also those that few tokens reach: on all tokens, their outputs stay nearer than with hqq."""
    source = tiny_model("qwen3_moe")
    # 40 tokens, of which no expert gets 32.
    options = ("--calib", text, *OPTIONS[:6], "--nsamples=1", "--seqlen=40")
    floats = {}
    for name, extra in {"all": ("--route-all-experts",), "hqq": ()}.items():
        done = run_moeq("quantize", source, "-o", tmp_path / name, *options, *extra)
        assert done.returncode == 0, done.stderr
        assert ("were rounded without them" in done.stdout) == (name == "hqq")
        floats[name] = dequantize_checkpoint(tmp_path / name, tmp_path / f"{name}-float")
    summary = json.loads((tmp_path / "all" / "moeq_calibration.json").read_text())
    assert summary["route_all_experts"] is True

    inputs: list[torch.Tensor] = []
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, arguments: inputs.append(arguments[0])
    )
    tokens = [byte + 3 for byte in text.read_bytes()]
    with torch.inference_mode():
        model(torch.tensor([tokens]))  # the drawn 40 are some of these
    errors = {}
    original = load_file(source / "model.safetensors")
    for name, folder in floats.items():
        found = load_file(folder / "model.safetensors")
        errors[name] = [
            ((found[key] - original[key].float()) @ inputs[0].T).norm().item()
            for key in found
            if "layers.0.mlp.experts" in key and "gate_proj" in key
        ]
    better = sum(a < b for a, b in zip(errors["all"], errors["hqq"], strict=True))
    assert better >= 6  # of 8 experts


def test_a_killed_run_is_resumed_and_gives_the_same_bytes(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source, out = tiny_model("mixtral"), tmp_path / "out"
    command = ("quantize", source, "-o", out, "--calib", text, *OPTIONS)
    assert run_moeq(*command).returncode == 0
    expected = _files(out)
    shutil.rmtree(out)

    # Killed before a layer is done, after the first one, and while the result is written.
    waits = ("fingerprint.json", "activations-00001.safetensors", "activations-00002.safetensors")
    for number, file in enumerate(waits):
        resume = ("--resume",) if number else ()
        process = start_moeq(*command, *resume)
        waited = tmp_path / UNFINISHED / file
        while process.poll() is None and not waited.exists():
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.communicate()
        assert not out.exists()
    done = run_moeq(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert _files(out) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}


def test_a_run_with_other_options_is_not_resumed(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    command = ("quantize", tiny_model("mixtral"), "-o", tmp_path / "out", "--calib", text)
    process = start_moeq(*command, *OPTIONS)
    while process.poll() is None and not (tmp_path / UNFINISHED / "fingerprint.json").exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = run_moeq(*command, *OPTIONS, "--seed", 1, "--resume")
    assert done.returncode == 1
    assert "the unfinished run had another calibration text; use the same options" in done.stderr
    done = run_moeq(*command, *OPTIONS, "--seed", 1)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("strategy", ["random:0", "auto"])
@pytest.mark.parametrize("ending", ["experts_3_w1_weight", "q_proj_weight"])
def test_values_that_are_not_finite_are_named(
    ending: str, strategy: str, tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    def poison(weight: torch.Tensor) -> torch.Tensor:
        return weight.index_fill(0, torch.tensor([1]), float("nan"))

    source = _copy(tiny_model("mixtral"), tmp_path / "model", **{ending: poison})
    command = ("quantize", source, "-o", tmp_path / "out", "--calib", text, *OPTIONS)
    done = run_moeq(*command, "--strategy", strategy)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    if ending == "q_proj_weight" and strategy == "auto":  # which rounds dense layers, too
        assert "cannot quantize model.layers.0.self_attn." in done.stderr
        assert "weights are NaN, infinite, or too large" in done.stderr
    elif ending == "q_proj_weight":
        assert "layer 0 gives NaN or infinity on the calibration text" in done.stderr
    else:
        name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
        if strategy == "auto":  # MaxVar meets it first
            assert f"{name} holds NaN or infinite weights" in done.stderr
        else:
            assert f"cannot quantize {name}: weights are NaN or infinite" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calib", "short.txt"), "no text in it has the 512 tokens of one sequence"),
        (("--calib", "empty.txt"), "empty.txt holds no text"),
        (("--calib", "missing.txt"), "missing.txt is no file or folder here"),
        (("--calib", "bad.jsonl"), 'bad.jsonl, line 2: no JSON object with a string "text"'),
        (("--calib", "binary.txt"), "cannot read the text binary.txt"),
        (
            ("--method", "gptq", "--calib", "none"),
            "--method gptq needs calibration text: give --calib a file, or default",
        ),
        (
            ("--method", "hqq", "--strategy", "uniform", "--seed", "1"),
            "--seed has no effect with --method hqq",
        ),
        (("--calib", "none", "--resume"), "--resume has no effect with --method rtn"),
        (("--calib", "short.txt", "--device", "gpu"), "--device gpu cannot be used: "),
        (("--calib", "short.txt", "--device", "cuda:7"), "--device cuda:7 cannot be used: "),
        (("--calib", "short.txt", "--device", "meta"), "--device meta cannot be used: "),
        (("--calib", "short.txt", "--nsamples", "0"), "--nsamples 0 is not a positive number"),
    ],
)
def test_bad_options_are_named(
    options: tuple[str, ...],
    message: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from moeq.cli import main

    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    Path("empty.txt").write_text(" \n")
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    command = ["quantize", str(tiny_model("mixtral")), "-o", "out", "--bits=2", "--group-size=32"]
    assert main([*command, *options]) == 1
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["default", "folder", "jsonl"])
def test_sources_of_text(kind: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / kind).mkdir()
        for name in ("a.txt", "b.md", "c.bin"):
            (tmp_path / kind / name).write_text(TEXT[:2000])
    if kind == "jsonl":
        lines = [json.dumps({"text": line}) for line in TEXT.splitlines()]
        (tmp_path / "text.jsonl").write_text("\n".join(lines))
    source = {"default": "default", "folder": tmp_path / kind, "jsonl": tmp_path / "text.jsonl"}
    done = run_moeq(
        "quantize", tiny_model("mixtral"), "-o", tmp_path / "out", *OPTIONS, "--calib",
        source[kind], "--dry-run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rounding         gptq, 24 x 48 tokens of" in done.stdout
    assert "peak memory" in done.stdout and "calibrating      about " in done.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {"folder", "text.jsonl"}


def _peak_memory(folder: Path, text: Path, layers: int) -> int:
    """Return the most memory that `moeq quantize` takes for a model, in bytes."""
    model = folder / f"{layers}-layers"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=259, hidden_size=512, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=8,
    )  # fmt: skip
    MixtralForCausalLM(config).bfloat16().save_pretrained(model)
    save_tokenizer(model)
    # Not wait4's ru_maxrss: that counts what the parent had before the child became moeq.
    program = (
        "import sys; from moeq.cli import main; status = main(sys.argv[1:]); "
        "print(open('/proc/self/status').read()); sys.exit(status)"
    )
    command: list[str | Path] = [
        sys.executable, "-c", program, "quantize", model, "-o", model / "packed", "--bits", "2",
        "--strategy", "uniform", "--calib", text, "--nsamples", "4", "--seqlen", "64",
        "--max-shard-size", "4MB",  # the file that is being written is in memory
    ]  # fmt: skip
    # What the allocator keeps for later is not what the program holds.
    returned = {
        "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # fmt: skip
    done = subprocess.run(
        command, env=environment() | returned, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert peak is not None
    return int(peak[1]) << 10


def test_memory_does_not_grow_with_the_number_of_layers(text: Path, tmp_path: Path) -> None:
    # The weights of three layers more are 76 MB.
    assert _peak_memory(tmp_path, text, 4) - _peak_memory(tmp_path, text, 1) < 30e6
