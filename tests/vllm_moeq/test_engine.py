"""A real engine in every mode that users choose: compiled, parallel, dummy weights, batches."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.cli import run_moeq
from support.engine import (
    TWO_RANKS,
    Completion,
    EngineRun,
    assert_same,
    run_engine,
    run_transformers,
    run_two_engines,
)
from support.linear import pack_linear
from support.models import load_model
from support.packed import W2_BITS, W13_BITS, pack_mixed
from support.reference import dequantize_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

HIDDEN, INTERMEDIATE, GROUP = 128, 256, 32


@pytest.fixture(scope="module")
def packed(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "packed"
    return pack_linear(pack_mixed(tiny_model("mixtral"), folder, GROUP))


@pytest.fixture(scope="module")
def expected(packed: Path) -> list[Completion]:
    plain = dequantize_checkpoint(packed, packed.with_name("plain"))
    return run_transformers(plain)


def _experts_bytes(experts: list[int], layer: int, ranks_per_expert: int) -> dict[str, int]:
    """Bytes of each projection that a rank needs for these experts, from the plan alone."""
    bits = {
        "w13": W13_BITS[layer:] + W13_BITS[:layer],
        "w2": W2_BITS[layer:] + W2_BITS[:layer],
    }
    result = {}
    for projection, weights in (("w13", 2 * INTERMEDIATE * HIDDEN), ("w2", INTERMEDIATE * HIDDEN)):
        packed = sum(weights * bits[projection][expert] // 8 for expert in experts)
        scales_and_zeros = len(experts) * weights // GROUP * 3
        result[projection] = (packed + scales_and_zeros) // ranks_per_expert
    return result


def _assert_buffers(
    run: EngineRun, experts_of_rank: list[list[int]], ranks_per_expert: int
) -> None:
    assert len(run.buffers) == len(experts_of_rank)
    for sizes, experts in zip(run.buffers, experts_of_rank, strict=True):
        for layer in (0, 1):
            # A kernel may keep scales and zero points among the packed weights.
            found = {
                projection: sum(
                    size
                    for name, size in sizes.items()
                    if name.startswith(f"model.layers.{layer}.") and f".{projection}_" in name
                )
                for projection in ("w13", "w2")
            }
            assert found == _experts_bytes(experts, layer, ranks_per_expert)


def test_tensor_parallel(packed: Path, expected: list[Completion]) -> None:
    run = run_engine(packed, spawn_workers=True, **TWO_RANKS)

    assert_same(run.completions[0], expected)
    _assert_buffers(run, [list(range(8))] * 2, ranks_per_expert=2)


def test_expert_parallel(packed: Path, expected: list[Completion]) -> None:
    run = run_engine(packed, enable_expert_parallel=True, **TWO_RANKS)

    assert_same(run.completions[0], expected)
    _assert_buffers(run, [[0, 1, 2, 3], [4, 5, 6, 7]], ranks_per_expert=1)


def test_data_parallel(packed: Path, expected: list[Completion]) -> None:
    runs = run_two_engines(packed)

    assert_same([answer for run in runs for answer in run.completions[0]], expected)
    for run in runs:
        _assert_buffers(run, [list(range(8))], ranks_per_expert=2)


def test_compiled_cache_is_not_reused_for_another_plan(
    packed: Path, expected: list[Completion], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    # vLLM's compile cache goes by the path and config of the model. A second plan at the same
    # path must not run with what the first one left there.
    environment = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    model = tmp_path / "model"
    shutil.copytree(packed, model)
    first = run_engine(model, environment=environment, enforce_eager=False)
    assert_same(first.completions[0], expected)

    shutil.rmtree(model)
    again = run_moeq(
        "quantize", tiny_model("mixtral"), "-o", model,
        "--bits", 3.5, "--group-size", 64, "--strategy", "random:1", "--calib", "none",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    second = run_engine(model, environment=environment, enforce_eager=False)
    plain = dequantize_checkpoint(model, tmp_path / "plain")
    assert_same(second.completions[0], run_transformers(plain))


def test_corruption_is_caught(packed: Path, expected: list[Completion]) -> None:
    # Rows 2.. of the layout are the experts: w13 bits, w13 offset, w2 bits, w2 offset.
    experts = _layout_rows()
    run = run_engine(
        packed,
        environment={"MOEQ_KERNEL": "reference"},  # which uses all of this as it is
        corruptions=[
            ("moeq_layout", [2 + 4, 0], 2),  # width of expert 4's w13: 1 -> 2
            ("moeq_layout", [2 + 1, 1], experts[1][1] + 4),  # expert 1's w13 four bytes late
            ("moeq_layout", [2 + 1, 2], 3),  # width of expert 1's w2: 4 -> 3
            ("moeq_layout", [2 + 5, 3], experts[3][3]),  # expert 5's w2 from expert 3's place
            ("w13_weight_zero_point", [2], 0),  # all zero points of expert 2's w13
            ("w2_weight_zero_point", [6], 255),  # all zero points of expert 6's w2
        ],
    )

    assert_same(run.completions[0], expected)
    assert len(run.completions) == 7
    for corrupted in run.completions[1:]:
        with pytest.raises(AssertionError):
            assert_same(corrupted, expected)


def _layout_rows() -> list[tuple[int, int, int, int]]:
    rows = []
    w13_offset = w2_offset = 0
    for w13, w2 in zip(W13_BITS, W2_BITS, strict=True):
        rows.append((w13, w13_offset, w2, w2_offset))
        w13_offset += 2 * INTERMEDIATE * HIDDEN * w13 // 8
        w2_offset += INTERMEDIATE * HIDDEN * w2 // 8
    return rows


def test_dummy_weights_need_no_files(packed: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "moeq_manifest.json"):
        shutil.copy(packed / name, tmp_path)

    run = run_engine(tmp_path, load_format="dummy")

    assert all(len(completion.tokens) > 0 for completion in run.completions[0])
    _assert_buffers(run, [list(range(8))], ranks_per_expert=1)


@pytest.mark.parametrize(("kernel", "saved_again"), [("cpu", True), ("reference", False)])
def test_kernel_is_chosen_by_name(
    packed: Path, expected: list[Completion], kernel: str, saved_again: bool, tmp_path: Path
) -> None:
    if saved_again:  # by transformers, with the tensors in another order and in more files
        import vllm_moeq.hf  # noqa: F401

        load_model(packed).save_pretrained(tmp_path, max_shard_size="400KB")
        for path in packed.glob("*token*"):
            shutil.copy(path, tmp_path)
        packed = tmp_path
    run = run_engine(packed, environment={"MOEQ_KERNEL": kernel}, quantization="moeq")

    assert f"moeq experts run on the {kernel} kernel" in run.log
    assert f"moeq linear layers run on the {kernel} kernel" in run.log
    assert_same(run.completions[0], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(packed: Path, expected: list[Completion], dtype: str) -> None:
    run = run_engine(packed, dtype=dtype)

    # Half precision cannot be compared at 1e-3; the first token of each prompt must agree.
    same = [a.tokens[0] == b.tokens[0] for a, b in zip(run.completions[0], expected, strict=True)]
    assert sum(same) >= len(same) - 1
