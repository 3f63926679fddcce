"""The entry point: harmless, repeatable, and quiet where vLLM does not fit."""

import subprocess
import sys

import pytest

_REGISTER_AND_LIST = """
import vllm
{before}
import vllm_moeq
vllm_moeq.register()
vllm_moeq.register()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
print("registered", QUANTIZATION_METHODS.count("moeq"))
"""


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )


def test_packages_import_without_vllm() -> None:
    # An entry of None makes every import of vllm fail.
    done = _run(
        "import sys; sys.modules['vllm'] = None\n"
        "import moeq, moeq.cli, moeq.checkpoint.writer\n"
        "import vllm_moeq, vllm_moeq.format, vllm_moeq.kernels\n"
        "import vllm_moeq.expert_buffers\n"
        "assert 'transformers' not in sys.modules\n"
        "import vllm_moeq.hf"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.vllm
def test_registers_once() -> None:
    done = _run(_REGISTER_AND_LIST.format(before=""))
    assert done.returncode == 0, done.stderr
    assert "registered 1" in done.stdout


@pytest.mark.vllm
@pytest.mark.parametrize("version", ["0.29.0", "0.34.0", "dev"])
def test_another_vllm_gets_one_clear_line(version: str) -> None:
    done = _run(_REGISTER_AND_LIST.format(before=f"vllm.__version__ = {version!r}"))
    assert done.returncode == 0, done.stderr
    assert "registered 0" in done.stdout
    assert version in done.stdout + done.stderr


@pytest.mark.vllm
def test_a_moved_interface_gets_one_clear_line() -> None:
    before = "import vllm.model_executor.layers.fused_moe as moved\ndel moved.RoutedExperts"
    done = _run(_REGISTER_AND_LIST.format(before=before))
    assert done.returncode == 0, done.stderr
    assert "registered 0" in done.stdout
    assert "lacks an interface that it uses" in done.stdout + done.stderr
