"""The quickstart from end to end, with a shorter training."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints import mixtral_tensors, write_checkpoint
from support.engine import engine_environment

EXAMPLES = Path(__file__).parents[2] / "examples"


def _quickstart(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = engine_environment()
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    bin_folder = Path(sys.executable).parent
    return subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py", *map(str, arguments)],
        env=environment | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.mark.vllm
@pytest.mark.slow
def test_trains_quantizes_serves_and_answers(tmp_path: Path) -> None:
    done = _quickstart("--work", tmp_path, "--seconds", 15)

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^answer    '.+'$", done.stdout, re.MULTILINE | re.DOTALL)
    sizes = re.findall(r"([\d.]+) MB   held-out perplexity ([\d.]+)", done.stdout)
    (original, before), (packed, after) = [tuple(map(float, pair)) for pair in sizes]
    assert packed < original / 2
    # 2.5 bits cost something, and a server that computes nonsense costs far more.
    assert before < 2048
    assert 0.9 < after / before < 1.5
    # How many of the bytes go to dense layers is measured, and training is never twice the same.
    experts = re.search(
        r"^experts +([\d.]+) bits on average, ([\d.]+) with scales", done.stdout, re.MULTILINE
    )
    assert experts, done.stdout
    bits, with_scales = map(float, experts.groups())
    assert 1.5 <= bits <= 4
    assert with_scales - bits == pytest.approx(0.1875)  # groups of 128: a scale, a zero point
    assert re.search(r"^dense +\d+ ", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_model_that_cannot_be_quantized_ends_it(tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    del tensors["lm_head.weight"]
    model = write_checkpoint(tmp_path / "model", tensors)
    done = _quickstart(model, "--work", tmp_path / "work")
    assert done.returncode == 1
    assert "tensor lm_head.weight [32, 64] is missing" in done.stderr
    assert "this step failed: moeq quantize" in done.stderr
