"""What benchmarks make of figures that were measured: parsing, ratios, models, rows."""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from moeq.evaluation import Scores
from vllm_moeq.format import BitPlan, LayerBits, Provenance

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
Import = Callable[[str], ModuleType]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Return a function that imports a script as it imports what lies beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module
    sys.modules.pop("results", None)


def test_vllm_bench_reads_what_vllm_reports(benchmark: Import) -> None:
    script = benchmark("vllm_bench")
    assert script.of_throughput({"requests_per_second": 2, "tokens_per_second": 384.5}) == {
        "`throughput`: requests/s": 2.0,
        "`throughput`: tokens/s, prompts among them": 384.5,
    }
    served = {
        "completed": 16, "request_throughput": 1.5, "output_throughput": 96.0,
        "mean_ttft_ms": 210.0, "mean_tpot_ms": 31.5, "p99_tpot_ms": 99.0,
    }  # fmt: skip
    assert [*script.of_serve(served, 16).values()] == [1.5, 96.0, 210.0, 31.5]
    with pytest.raises(RuntimeError, match="15 of 16 requests were answered"):
        script.of_serve(served | {"completed": 15}, 16)


def test_vllm_bench_compares_medians(benchmark: Import) -> None:
    original = {"requests/s": [1.0, 2.0, 9.0], "ms": [100.0, 120.0]}
    packed = {"requests/s": [3.0, 3.5, 3.0], "ms": [50.0, 60.0]}
    assert benchmark("vllm_bench").compared(original, packed) == [
        ["requests/s", "2 (1–9)", "3 (3–3.5)", "1.50"],
        ["ms", "110 (100–120)", "55 (50–60)", "0.50"],
    ]


def test_ray_scaling_models_what_workers_share(benchmark: Import) -> None:
    script = benchmark("ray_scaling")
    assert script.modelled(100.0, 0.0, 4) == 4.0  # all is shared
    assert script.modelled(100.0, 100.0, 4) == 1.0  # nothing is
    assert script.modelled(100.0, 20.0, 2) == pytest.approx(100 / 60)
    costs = [script.Cost(110.4, 100.0), script.Cost(130.0, 25.0), script.Cost(80.0, 20.0)]
    assert script.row_of("GPTQ", costs) == [
        "GPTQ", "110", "130", "80", "100", "20", "1.67", "2.50",
    ]  # fmt: skip


def test_ray_scaling_compares_bytes(benchmark: Import, tmp_path: Path) -> None:
    same_files = benchmark("ray_scaling").same_files
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "weights").write_bytes(b"same")
    assert same_files(first, second)
    (second / "weights").write_bytes(b"Same")
    assert not same_files(first, second)
    (second / "weights").write_bytes(b"same")
    (second / "more").touch()
    assert not same_files(first, second) and not same_files(second, first)


def test_dense_curve_tells_models_and_widths(benchmark: Import, tmp_path: Path) -> None:
    script = benchmark("dense_curve")
    layer = LayerBits((2, 3, 4), (2, 2, 2))
    plan = BitPlan(
        128,
        {f"model.layers.{number}.mlp.experts": layer for number in range(2)},
        Provenance("auto: sensitivity", achieved_bits=2.5, total_bytes=2_299_392),
        {"model.layers.0.self_attn.q_proj": 8, "a": 8, "b": 4},
    )
    scores = Scores(tokens=10, loss=4.5, original_loss=4.4979, divergence=0.00123, agreement=0.9)
    assert script.row_of(plan, scores) == [
        "2,299,392", "2.500", "1 x 4, 2 x 8", "auto: sensitivity", "+0.0021", "0.00123",
    ]  # fmt: skip
    bare = BitPlan(128, plan.expert_bits)
    better = Scores(tokens=10, loss=4.4, original_loss=4.5, divergence=0.0, agreement=1.0)
    assert script.row_of(bare, better)[2:] == ["none", "unknown", "-0.1000", "0.00000"]
    assert script.title_of(tmp_path / "fine" / ".." / "model", plan) == (
        "model (2 layers x 3 experts)"
    )


def test_what_was_told_is_judged_either_way(benchmark: Import) -> None:
    script = benchmark("quantize_cost")
    taken = [script.Cost(seconds=100.0, processor=180.0, memory=1000)] * 2
    for seconds, memory, met in ((149, 1149, True), (67, 870, True), (151, 1151, False),
                                 (66, 869, False)):  # fmt: skip
        told = [script.Cost(seconds, 0.0, memory)] * 2
        assert [line.startswith("- **met**") for line in script.verdict(told, taken)] == [met] * 2


@pytest.mark.parametrize(
    ("options", "title"),
    [((), "model (2 layers x 3 experts)"), (("--title", "fine-grained"), "fine-grained")],
)
def test_dense_curve_names_its_section(
    options: tuple[str, ...],
    title: str,
    benchmark: Import,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    script, results = benchmark("dense_curve"), tmp_path / "RESULTS.md"
    layer = LayerBits((2, 3, 4), (2, 2, 2))
    plan = BitPlan(128, {f"model.layers.{number}.mlp.experts": layer for number in range(2)})
    scores = Scores(tokens=10, loss=4.5, original_loss=4.4979, divergence=0.00123, agreement=0.9)
    monkeypatch.setattr(script, "measure", lambda *_: (plan, scores))  # takes an hour
    command = ["dense_curve.py", "model", "--calib=a", "--text=b", f"--results={results}"]
    monkeypatch.setattr("sys.argv", [*command, "--sizes", "2MB", *options])
    script.main()
    assert f"\n## dense layers: {title}\n" in results.read_text()
