"""The C++ kernel under AddressSanitizer and UndefinedBehaviorSanitizer."""

import subprocess
from pathlib import Path

import pytest

from vllm_moeq.kernels.cpu.build import INSTRUCTION_SETS, PORTABLE

SCRIPT = Path(__file__).parents[3] / "sanitize.sh"


@pytest.mark.slow
@pytest.mark.skipif(not PORTABLE.runs_here(), reason="needs x86-64 with AVX2")
def test_random_layers_are_right_and_clean() -> None:
    done = subprocess.run([SCRIPT, "30"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    avx512 = any(isa.name == "avx512_vnni" and isa.runs_here() for isa in INSTRUCTION_SETS)
    assert done.stdout.count("30 cases, 0 failed") == 2 + avx512
