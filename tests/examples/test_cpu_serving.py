"""The serving benchmark from end to end, with a tiny model and short answers."""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import OlmoeForCausalLM

from support.engine import engine_environment

BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmarks" / "cpu_serving.py"
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "eos_token_id": 0,
}
MODES = ("LLM.generate", "vllm serve")
ALWAYS = {
    "prefill, tokens/s",
    "decode, 1 at once, tokens/s",
    "decode, 8 at once, tokens/s",
    "memory after start-up, GB",
    "memory after the work, GB",
    "memory at its peak, GB",
}


@pytest.mark.vllm
@pytest.mark.slow
def test_measures_all_models_and_writes_the_section(tmp_path: Path) -> None:
    # Fewer processes, and no Inductor: vLLM starts six times.
    environment = engine_environment(VLLM_CPU_CI_ENV="1")
    bin_folder = Path(sys.executable).parent
    results, work = tmp_path / "RESULTS.md", tmp_path / "work"
    short = "--layers 2 --threads 1 --rounds 1 --repeats 1 --prompt-tokens 64 --new-tokens 32"
    command: list[str | Path] = [
        sys.executable,
        BENCHMARK,
        "--work",
        work,
        "--results",
        results,
        *short.split(),
        *("--dense-bits", "4e", "--no-polling"),
    ]
    done = subprocess.run(
        [*command, "--config", json.dumps(SHAPE)],
        env=environment | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((work / "figures.json").read_text())
    starts = dict(zip(MODES, ("first start-up, compiling, s", "start-up, s"), strict=True))
    text = results.read_text()
    cpu = "CPU with AVX-512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "CPU"
    assert f"## vLLM on a {cpu}: OLMoE-1B-7B with " in text
    assert ", 1 thread, nothing polls\n" in text
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    for number, (mode, start) in enumerate(starts.items()):
        bf16, *others = figures[mode].values()
        assert list(figures[mode]) == ["bf16", "packed", "packed, dense 4, embeddings too"]
        for column, packed in enumerate(others, 3 * number + 2):
            assert set(bf16) == set(packed) == ALWAYS | {start}
            for name in bf16:
                assert min(bf16[name] + packed[name]) > 0, (mode, name)
                cells = rows[f"| {name}"].strip("| ").split(" | ")
                expected = statistics.median(packed[name]) / statistics.median(bf16[name])
                assert cells[column].endswith(f" × {expected:.2f}"), (mode, name)
    assert re.search(
        r"packed, dense 4, embeddings too .*: prefill \S+ and \S+, (meets|MISSES) 3 times", text
    )
    assert re.search(r"without the KV cache \S+ and \S+, (meets|MISSES) 25% of bf16", text)
    experts = r"moeq experts run on the \w+ kernel"
    assert re.search(
        rf"packed: {experts}; packed, dense 4, embeddings too: {experts}, moeq linear layers", text
    )

    # The weights made up have the names that transformers expects.
    _, loading = OlmoeForCausalLM.from_pretrained(
        work / "2x8x256-bf16", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(loading.values()), loading
