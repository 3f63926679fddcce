"""Measured plans through the real ``moeq`` command."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeq.model.text import calibration_sequences
from support.cli import INTERRUPTED, run_moeq, start_moeq
from support.reference import dequantize_checkpoint

pytestmark = pytest.mark.slow

TEXT = "".join(f"Line {i} of a text whose bytes are tokens, {i * i % 97}.\n" for i in range(400))
CALIBRATION = ("--nsamples", 16, "--seqlen", 48)
LAYER = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _plan(model: Path, *options: object) -> dict[str, Any]:
    group_size = () if "--group-size" in options else ("--group-size", 32)
    done = run_moeq("plan", model, "--json", *group_size, *options)
    assert done.returncode == 0, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def _command(model: Path, text: Path, output: Path) -> tuple[object, ...]:
    """Return the command that quantizes with a measured plan."""
    return (
        "quantize", model, "-o", output, "--bits", 2.5, "--group-size", 32, "--strategy",
        "sensitivity", "--calib", text, *CALIBRATION,
    )  # fmt: skip


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_matters_most_gets_most_bits(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """An expert whose output counts ten times as much as another's."""
    source = tmp_path / "model"
    shutil.copytree(tiny_model("mixtral"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[f"{LAYER}.3.w2.weight"] *= 10
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    options = ("--bits", 2.5, "--calib", text, *CALIBRATION, "--method", "rtn")
    plan = _plan(source, *options, "--strategy", "sensitivity", "--dense-bits", 16)
    bits = plan["expert_bits"][LAYER]
    assert bits["w13"][3] == max(bits["w13"]) > min(bits["w13"])
    assert bits["w2"][3] == max(bits["w2"])
    # As many bytes as two and three bits, half of each.
    equal = _plan(source, "--bits", 2.5, "--strategy", "random:0")
    spent = plan["provenance"]["expert_bytes"]
    assert 0.98 * equal["provenance"]["expert_bytes"] < spent
    assert spent <= equal["provenance"]["expert_bytes"]
    assert plan["provenance"]["details"]["gap_to_the_best_plan"] < 0.05


@pytest.mark.parametrize("bits", [2.5, 3])
def test_auto_takes_the_best_of_what_it_tried(
    bits: float, tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source, out = tiny_model("mixtral"), tmp_path / "out"
    done = run_moeq(
        "quantize", source, "-o", out, "--bits", bits, "--group-size", 32, "--calib", text,
        *CALIBRATION,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = [
        line.rsplit(maxsplit=3)
        for line in done.stdout.splitlines()
        if "  +" in line or "  -" in line
    ]
    names = {row[0].strip() for row in table}
    rules = {"combined", "maxvar", "pmq", "random:0", "random:1", "random:2"}
    measured = {"sensitivity", "sensitivity, dense layers of 16 bits"}
    assert names == measured | ({"uniform"} if bits == 3 else rules)
    divergences = [float(row[2]) for row in table]
    assert divergences == sorted(divergences)
    sizes = [int(row[1].replace(",", "")) for row in table]
    assert max(sizes) - min(sizes) < 0.02 * max(sizes)
    config = json.loads((out / "config.json").read_text())
    strategy = config["quantization_config"]["provenance"]["strategy"]
    assert strategy == f"auto: {table[0][0].strip()}"
    assert run_moeq("verify", out).returncode == 0


def test_plans_are_judged_by_the_divergence_on_text_held_back(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """The one in the table, against transformers in float64 with the weights of that plan."""
    source = tiny_model("mixtral")
    options = ("--bits", 3, "--group-size", 32, "--method", "rtn")
    planned = run_moeq("plan", source, *options, "--calib", text, *CALIBRATION)
    assert planned.returncode == 0, planned.stderr
    row = next(line for line in planned.stdout.splitlines() if line.startswith("uniform"))
    stated = [float(cell) for cell in row.split()[-2:]]

    packed = tmp_path / "packed"
    # Beside a plan that chooses them, dense layers have 8 bits.
    uniform = ("--strategy", "uniform", "--dense-bits", 8)
    done = run_moeq("quantize", source, "-o", packed, *options, *uniform)
    assert done.returncode == 0, done.stderr
    dequantize_checkpoint(packed, tmp_path / "float")
    count, length = CALIBRATION[1::2]
    held_back = calibration_sequences(source, str(text), count, length, 0)[: count // 4]
    log_probabilities = []
    for folder in (source, tmp_path / "float"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager"
        )
        with torch.inference_mode():
            log_probabilities.append(model(held_back).logits[:, :-1].log_softmax(-1))
    original, found = log_probabilities
    following = held_back[:, 1:, None]
    divergence = (original.exp() * (original - found)).sum(-1).mean()
    increase = (original - found).gather(2, following).mean()
    assert stated == pytest.approx([divergence.item(), increase.item()], rel=0.01, abs=1e-5)


def test_auto_keeps_to_the_options_of_the_plan(
    tiny_model: Callable[[str], Path], text: Path
) -> None:
    options = ("--levels", "4,2", "--zeta", 2, "--maxvar", "highest-norm-row", "--method", "rtn")
    plan = _plan(tiny_model("mixtral"), "--bits", 2.5, "--calib", text, *CALIBRATION, *options)
    for bits in plan["expert_bits"].values():
        assert {*bits["w13"], *bits["w2"]} <= {2, 4}


def test_side_constraints_are_fulfilled(tiny_model: Callable[[str], Path], text: Path) -> None:
    options: tuple[object, ...] = (
        "--bits", 2.5, "--calib", text, *CALIBRATION, "--method", "rtn",
    )  # fmt: skip
    options += ("--strategy", "sensitivity")
    side = ("--ranks", 4, "--layer-tolerance", 0.02, "--widths-per-layer", 2)
    free = _plan(tiny_model("mixtral"), *options)
    for extra in (side, (*side, "--same-width")):
        plan = _plan(tiny_model("mixtral"), *options, *extra)
        assert _spread(plan, "layer") <= 0.02 < _spread(free, "layer")
        assert _spread(plan, "rank") <= 0.01 < _spread(free, "rank")
        for bits in plan["expert_bits"].values():
            assert len({*bits["w13"], *bits["w2"]}) <= 2
            assert (bits["w13"] == bits["w2"]) == ("--same-width" in extra)
        estimate = plan["provenance"]["details"]["estimated_divergence"]
        assert estimate > free["provenance"]["details"]["estimated_divergence"]
        spent = plan["provenance"]["expert_bytes"]
        assert 0.9 * free["provenance"]["expert_bytes"] < spent


def _spread(plan: dict[str, Any], kind: str) -> float:
    """Return by how much of their mean the bits of layers, or of 4 ranks, differ from it."""
    sums: dict[int, float] = {}
    for layer, bits in enumerate(plan["expert_bits"].values()):
        for expert in range(8):
            key = layer if kind == "layer" else expert // 2
            # w13 has twice as many weights; scales and zero points add 0.75 bits.
            width = 2 * (bits["w13"][expert] + 0.75) + bits["w2"][expert] + 0.75
            sums[key] = sums.get(key, 0) + width
    mean = sum(sums.values()) / len(sums)
    return max(abs(value / mean - 1) for value in sums.values())


def test_auto_tries_what_fulfils_the_side_constraints(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    done = run_moeq(
        "plan", tiny_model("mixtral"), "-o", tmp_path / "plan.json", "--bits", 2.5, "--calib", text,
        "--group-size", 32, *CALIBRATION, "--method", "rtn", "--ranks", 8,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # No rule looks at ranks, of one expert each.
    tried = json.loads((tmp_path / "plan.json").read_text())["provenance"]["details"]["tried"]
    assert {plan["strategy"].partition(",")[0] for plan in tried} == {"sensitivity"}


def test_the_group_size_can_be_left_to_the_plan(
    tiny_model: Callable[[str], Path], text: Path
) -> None:
    options: tuple[object, ...] = (
        "--calib", text, *CALIBRATION, "--method", "rtn", "--strategy", "sensitivity",
    )  # fmt: skip
    options += ("--bits-per-weight", 4.5, "--levels", "4,3,2", "--dense-bits", 16)
    found = {}
    for group_sizes in ("32", "64", "128", "32,64,128"):
        plan = _plan(tiny_model("mixtral"), *options, "--group-size", group_sizes)
        estimate = plan["provenance"]["details"]["estimated_divergence"]
        found[group_sizes] = plan["group_size"], estimate
        assert 8 * plan["provenance"]["total_bytes"] <= 4.5 * _weights(tiny_model("mixtral"))
    chosen = found.pop("32,64,128")
    assert chosen == min(found.values(), key=lambda item: item[1])
    assert len({estimate for _, estimate in found.values()}) == 3


def test_rules_cannot_choose_the_group_size(tiny_model: Callable[[str], Path]) -> None:
    done = run_moeq(
        "plan", tiny_model("mixtral"), "--bits", 2, "--group-size", "32,64", "--calib=none"
    )
    assert done.returncode == 1
    assert "--group-size 32,64 is a choice that --strategy combined cannot make" in done.stderr


def test_dry_run_measures_nothing(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    done = run_moeq(
        "quantize", tiny_model("mixtral"), "-o", tmp_path / "out", "--bits", 2.5,
        "--group-size", 32, "--calib", text, *CALIBRATION, "--dry-run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "gradients" not in done.stderr and "widths (" not in done.stderr
    for stated in ("peak memory      about", "measuring        about", "calibrating      about"):
        assert stated in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}


def test_dry_run_refuses_what_the_run_would(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    command = (
        "quantize", tiny_model("mixtral"), "-o", tmp_path / "out", "--bits", 2.5, "--group-size",
        32, "--calib", text, *CALIBRATION,
    )  # fmt: skip
    for options, message in {
        ("--ranks", 16, "--dry-run"): "16 ranks of equal bytes",
        # Not only after the measurement:
        ("--method", "rtn", "--route-all-experts"): "--route-all-experts has no effect",
    }.items():
        done = run_moeq(*command, *options)
        assert done.returncode == 1
        assert message in done.stderr and "gradients" not in done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}


def test_two_runs_do_not_measure_into_one_output(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    command = _command(tiny_model("mixtral"), text, tmp_path / "out")
    first = start_moeq(*command)
    kept = tmp_path / ".out.moeq" / "plan" / "plan.json"
    while first.poll() is None and not kept.exists():
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)  # with its plan, before it is rounded
    second = run_moeq(*command)
    assert second.returncode == 1
    assert f"another `moeq quantize` is writing {tmp_path / 'out'}" in second.stderr
    assert kept.exists()
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}


def test_ctrl_c_before_anything_is_measured_leaves_nothing(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    process = start_moeq(*_command(tiny_model("mixtral"), text, tmp_path / "out"))
    begun = tmp_path / ".out.moeq" / "plan" / "measurement" / "input-0.bin"
    while process.poll() is None and not begun.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in INTERRUPTED, errors
    assert "moeq quantize: interrupted" in errors and "Traceback" not in errors
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}


def test_a_file_in_the_way_is_named(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    (tmp_path / ".out.moeq").write_text("a file")
    done = run_moeq(*_command(tiny_model("mixtral"), text, tmp_path / "out"))
    assert done.returncode == 1
    assert f"cannot write {tmp_path / '.out.moeq'}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_measured_plan_outlives_a_kill(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    command = _command(tiny_model("mixtral"), text, tmp_path / "out")
    done = run_moeq(*command)
    assert done.returncode == 0, done.stderr
    expected = _read(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    process = start_moeq(*command)
    kept = tmp_path / ".out.moeq" / "plan" / "plan.json"
    while process.poll() is None and not kept.exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert kept.exists() and not (tmp_path / "out").exists()

    other = run_moeq(*command, "--seed", 1, "--resume")
    assert other.returncode == 1
    assert "the unfinished run had another calibration text, another seed" in other.stderr
    done = run_moeq(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert "gradients" not in done.stderr  # nothing is measured again
    assert _read(tmp_path / "out") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}


def test_a_killed_measurement_goes_on_where_it_ended(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    command = _command(tiny_model("mixtral"), text, tmp_path / "out")
    assert run_moeq(*command).returncode == 0
    expected = _read(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    measured = tmp_path / ".out.moeq" / "plan" / "measurement" / "32" / "layer-00001.json"

    def killed(*more: str) -> None:
        process = start_moeq(*command, *more)
        while process.poll() is None and not measured.exists():
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert measured.exists() and not (tmp_path / "out").exists()

    killed()
    done = run_moeq(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert _read(tmp_path / "out") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}
    shutil.rmtree(tmp_path / "out")

    # What is on disk is used: with other errors there, the plan is another.
    killed()
    found = json.loads(measured.read_text())
    found["errors"] = [
        [choice, [value * (1e6 if choice[1] == 5 else 1) for value in error]]
        for choice, error in found["errors"]
    ]
    measured.write_text(json.dumps(found))
    done = run_moeq(*command, "--resume")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    bits = config["quantization_config"]["expert_bits"][LAYER.replace("0", "1")]
    assert bits["w13"][5] == max(bits["w13"]) > min(bits["w13"])
    assert bits["w2"][5] == max(bits["w2"])


def test_a_measurement_is_not_resumed_with_another_initial_router(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    model, router = tiny_model("mixtral"), tmp_path / "router.safetensors"
    routers = {
        name: tensor
        for name, tensor in load_file(model / "model.safetensors").items()
        if name.endswith(".gate.weight")
    }
    save_file(routers, router)
    command = (
        "quantize", model, "-o", tmp_path / "out", "--bits", 2.5, "--group-size", 32, "--calib",
        text, *CALIBRATION, "--base-router", router,
    )  # fmt: skip
    process = start_moeq(*command)
    measured = tmp_path / ".out.moeq" / "plan" / "measurement" / "32" / "layer-00001.json"
    while process.poll() is None and not measured.exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert measured.exists()
    save_file({name: 2 * tensor for name, tensor in routers.items()}, router)
    other = run_moeq(*command, "--resume")
    assert other.returncode == 1
    assert "the unfinished run had another initial router" in other.stderr


EXPERT_WEIGHTS, EXPERTS = 3 * 128 * 256, 2 * 8
"""Of the tiny Mixtral."""


@pytest.mark.parametrize("strategy", ["combined", "random:3", "uniform"])
@pytest.mark.parametrize(
    ("option", "value"), [("--target-size", "900kB"), ("--bits-per-weight", 4.5)]
)
@pytest.mark.parametrize("dense_bits", ["16", "8"])
def test_budgets_are_kept_and_used_up(
    option: str,
    value: object,
    strategy: str,
    dense_bits: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source, out = tiny_model("mixtral"), tmp_path / "out"
    done = run_moeq(
        "quantize", source, "-o", out, option, value, "--group-size", 32, "--strategy", strategy,
        "--method", "rtn", "--dense-bits", dense_bits,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tensors = load_file(next(out.glob("*.safetensors")))
    total = sum(tensor.nbytes for tensor in tensors.values())
    experts_in_a_step = EXPERTS if strategy == "uniform" else 1
    step = experts_in_a_step * EXPERT_WEIGHTS / 8  # one bit more
    allowed = 900_000 if option == "--target-size" else 4.5 * _weights(source) / 8
    assert allowed - step < total <= allowed


def _weights(source: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())


@pytest.mark.parametrize("strategy", ["auto", "sensitivity"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--bits-per-weight", 4.0),
        ("--bits-per-weight", 3.51),
        ("--bits", 2.7),
    ],
)
def test_measured_plans_use_up_their_budget(
    option: str,
    value: float,
    strategy: str,
    tiny_model: Callable[[str], Path],
    text: Path,
) -> None:
    source = tiny_model("mixtral")
    plan = _plan(
        source, option, value, "--group-size", 32, "--calib", text, *CALIBRATION,
        "--method", "rtn", "--strategy", strategy,
    )  # fmt: skip
    allowed = value * _weights(source) / 8
    if option == "--bits":  # with scales, and beside dense layers of 8 bits
        allowed = (value + 0.75) * EXPERTS * EXPERT_WEIGHTS / 8
        for name, tensor in load_file(source / "model.safetensors").items():
            if "self_attn" in name:
                allowed += tensor.numel() + tensor.numel() / 32 * 2 + 16
            elif ".experts." not in name:
                allowed += tensor.nbytes
    sizes = [plan["provenance"]["total_bytes"]]
    sizes += [tried["total_bytes"] for tried in plan["provenance"]["details"].get("tried", ())]
    for size in sizes:
        assert allowed - EXPERT_WEIGHTS / 8 < size <= allowed


@pytest.mark.parametrize(("more", "layers"), [((), 8), (("--quantize-embeddings",), 10)])
@pytest.mark.parametrize("strategy", ["auto", "sensitivity"])
def test_measured_plans_keep_to_one_width_of_dense_layers(
    strategy: str,
    more: tuple[str, ...],
    layers: int,
    tiny_model: Callable[[str], Path],
    text: Path,
) -> None:
    source = tiny_model("mixtral")
    plan = _plan(
        source, "--target-size", "800kB", "--dense-bits", 4, "--group-size", "32,64", "--calib",
        text, *CALIBRATION, "--method", "rtn", "--strategy", strategy, *more,
    )  # fmt: skip
    assert set(plan["linear_bits"].values()) == {4} and len(plan["linear_bits"]) == layers
    sizes = [plan["provenance"]["total_bytes"]]
    sizes += [tried["total_bytes"] for tried in plan["provenance"]["details"].get("tried", ())]
    assert all(800_000 - EXPERT_WEIGHTS / 8 < size <= 800_000 for size in sizes)


def test_identical_plans_are_tried_once(tiny_model: Callable[[str], Path], text: Path) -> None:
    options = ("--bits", 3, "--levels", 3, "--calib", text, *CALIBRATION, "--method", "rtn")
    tried = _plan(tiny_model("mixtral"), *options)["provenance"]["details"]["tried"]
    assert [plan["strategy"] for plan in tried] == ["sensitivity"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--calib", "none", "--strategy", "auto"),
            "--strategy auto needs calibration text: give --calib a file, or default",
        ),
        (("--calib", "none", "--nsamples", 3), "--nsamples has no effect without --calib"),
        (
            ("--calib", "none", "--method", "gptq"),
            "--method has no effect with --strategy combined",
        ),
        (("--bits", 2, "--target-size", "1MB"), "give only one of --bits and --target-size"),
        (
            ("--target-size", "100kB", "--calib=none"),
            "--target-size 100kB allows 100,000 bytes: the model takes at least",
        ),
        (("--target-size", "1"), "--target-size 1 is no size with a unit"),
        (("--bits-per-weight", 0.5, "--calib=none"), "--bits-per-weight 0.5 allows"),
        (("--bits", 2.5, "--calib", "TEXT", "--nsamples", 3), "needs at least 4 calibration"),
        (
            ("--bits", 2.5, "--calib", "TEXT", "--strategy", "combined"),
            "--calib has no effect with --strategy combined",
        ),
        (("--bits", 2.5, "--calib", "TEXT", "-o", "TEXT"), "text.txt exists already"),
        (("--bits", 2.5, "--calib", "TEXT", "-o", "no/plan"), "the folder no of --output does not"),
        (("--bits", 5, "--levels", "3,2", "--calib", "TEXT"), "is outside of --levels 3,2"),
        (
            ("--bits", 2.5, "--calib", "TEXT", "--strategy", "sensitivity", "--zeta", 2),
            "--zeta has no effect with --strategy sensitivity",
        ),
        (("--bits", 2.5, "--calib", "TEXT", "--ranks", 0), "--ranks 0 must be at least 1"),
        (("--bits", 2.5, "--calib", "TEXT", "--ranks", 16), "16 ranks of equal bytes"),
        (
            ("--bits", 2.5, "--ranks", 2, "--calib", "none"),
            "--ranks has no effect with --strategy combined",
        ),
    ],
)
def test_bad_options_are_named(
    options: tuple[object, ...], message: str, tiny_model: Callable[[str], Path], text: Path
) -> None:
    given = [text if word == "TEXT" else word for word in options]
    done = run_moeq("plan", tiny_model("mixtral"), "--group-size", 32, *given)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
