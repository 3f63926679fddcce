"""The end-to-end part of the GPU benchmark, in real vLLM on a CPU with a tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "benchmarks" / "gpu_e2e.py"


@pytest.mark.slow
@pytest.mark.vllm
def test_answers_are_right_and_rates_are_measured(tmp_path: Path) -> None:
    results = tmp_path / "results.md"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "offline")))
    done = subprocess.run(
        [
            sys.executable, str(SCRIPT), "--jobs", "eager", "moeq", "--shape", "256,256,8,2",
            "--layers", "1", "--requests", "1", "--results", str(results),
        ],
        env=os.environ | {"PYTHONPATH": paths, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    text = results.read_text()
    found = re.search(
        r"^\| eager \| float32 \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) of 128 \|$", text, re.M
    )
    assert found
    actual, expected, difference = map(float, found.groups()[:3])
    assert 5 < expected < 12 and actual == pytest.approx(expected, abs=1e-3)
    assert difference < 1e-3 and int(found[4]) >= 126
    assert "| graphs | not measured: the time was over |" in text
    assert "| tokens/s | decode, 1 | prefill, 1 × 512 | prefill, 8 × 1024 |" in text
    assert re.search(r"^\| moeq \|( \d+ \(1\.00×\) \|){3}$", text, re.M)
    assert re.search(r"^\| bf16 \|( not measured \|){3}$", text, re.M)
    assert "failed" not in text
    # Two sections: a run of some jobs leaves what another run found in the other.
    assert re.findall("^## (.*)$", text, re.M) == [
        "vLLM on a GPU: answers",
        "vLLM on a GPU: speed",
    ]


SABOTAGE = """
import sys
sys.path.insert(0, {folder!r})
import gpu_e2e
right = gpu_e2e.dequantize
gpu_e2e.dequantize = lambda packed, *rest: right(packed.flip(0), *rest)
gpu_e2e.measure_rates = lambda *_: (_ for _ in ()).throw(RuntimeError("out | of memory"))
gpu_e2e.main()
"""


@pytest.mark.slow
@pytest.mark.vllm
def test_wrong_answers_and_failures_are_told(tmp_path: Path) -> None:
    """Where the reference has the rows of every matrix in another order than vLLM."""
    results = tmp_path / "results.md"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "offline")))
    done = subprocess.run(
        [
            sys.executable, "-c", SABOTAGE.format(folder=str(SCRIPT.parent)),
            "--jobs", "gptq", "eager", "--results", str(results),
        ],
        env=os.environ | {"PYTHONPATH": paths, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 1
    assert "gpu_e2e.py: gptq: RuntimeError: out | of memory" in done.stderr
    assert re.search(r"gpu_e2e\.py: eager: differs by \d.*, more than rounding does", done.stderr)
    assert "eager failed: differs by" in results.read_text()


def test_dummy_configurations_quantize_experts_alone(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "from pathlib import Path\nimport gpu_e2e\n"
        "for kind in gpu_e2e.RATES:\n"
        "    gpu_e2e.write_dummy(Path(sys.argv[1]) / kind, kind, gpu_e2e.SHAPES['mixtral'], 3)\n"
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "offline")))
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths}, check=True,
    )  # fmt: skip
    configs = {
        kind: json.loads((tmp_path / kind / "config.json").read_text())
        for kind in ("moeq", "gptq", "bf16")
    }
    for config in configs.values():
        assert (config["hidden_size"], config["intermediate_size"]) == (4096, 14336)
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (32, 8)
    assert "quantization_config" not in configs["bf16"]
    layers = configs["moeq"]["quantization_config"]["expert_bits"]
    assert list(layers) == [f"model.layers.{i}.block_sparse_moe.experts" for i in range(3)]
    assert layers["model.layers.0.block_sparse_moe.experts"]["w13"] == [3, 2] * 4
    gptq = configs["gptq"]["quantization_config"]
    assert (gptq["bits"], gptq["group_size"]) == (4, 128)
    assert gptq["modules_in_block_to_quantize"] == ["block_sparse_moe.experts"]
