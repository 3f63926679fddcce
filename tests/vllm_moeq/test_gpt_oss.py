"""gpt-oss: gate and up that alternate, biases, and a loader of vLLM's that names its tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.engine import assert_same, run_engine, run_transformers
from support.packed import pack_mixed
from support.reference import dequantize_checkpoint

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
