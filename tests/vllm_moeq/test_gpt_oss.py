"""gpt-oss: gate and up that alternate, biases, and a loader of vLLM's that names its tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import change_tensors
from support.engine import assert_same, launch, run_engine, run_transformers
from support.packed import pack_mixed
from support.reference import dequantize_checkpoint
from vllm_moeq.format import MANIFEST_NAME

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("ranks", [1, 2])
def test_equals_transformers(tiny_model: Callable[[str], Path], tmp_path: Path, ranks: int) -> None:
    packed = pack_mixed(tiny_model("gpt_oss"), tmp_path / "packed")
    plain = dequantize_checkpoint(packed, tmp_path / "plain")
    parallel: dict[str, Any] = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    }
    run = run_engine(packed, **(parallel if ranks == 2 else {}))

    assert_same(run.completions[0], run_transformers(plain))


def test_parameters_that_are_not_filled_are_named(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = pack_mixed(tiny_model("gpt_oss"), tmp_path / "packed")
    (model / MANIFEST_NAME).unlink()  # it would notice first
    missing = ["self_attn.sinks", "self_attn.o_proj.bias", "mlp.router.bias"]
    change_tensors(
        model, lambda tensors: [tensors.pop(f"model.layers.1.{name}") for name in missing]
    )

    process = launch(model)

    assert process.returncode != 0
    assert (
        "holds NaN: model.layers.1.attn.sinks (4 of 4), model.layers.1.attn.o_proj.bias "
        "(128 of 128), model.layers.1.mlp.router.bias (8 of 8). Check it with `moeq verify`"
    ) in process.stdout + process.stderr
