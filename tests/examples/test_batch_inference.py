"""The example of batch inference, through a real engine."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.cli import run_moeq
from support.engine import engine_environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "batch_inference.py"
PROMPTS = ["def forward", "The expert", "quantize me!", "The expert"]


@pytest.mark.slow
@pytest.mark.vllm
def test_every_prompt_is_completed_in_order(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    packed, prompts, output = (tmp_path / name for name in ("packed", "in.txt", "out.jsonl"))
    options = ("--bits", 2.5, "--strategy", "random:1", "--group-size", 32, "--calib", "none")
    assert run_moeq("quantize", tiny_model("mixtral"), "-o", packed, *options).returncode == 0
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    command: list[str | Path] = [sys.executable, EXAMPLE, packed, prompts, output, "--max-tokens=5"]
    done = subprocess.run(
        [*command, "--max-model-len=64"],
        env=engine_environment(VLLM_ENABLE_V1_MULTIPROCESSING="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "exited unexpectedly" not in done.stderr  # so says vLLM of an engine nobody shut down
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [entry["prompt"] for entry in found] == PROMPTS
    assert all(entry["completion"] for entry in found)
    assert found[1] == found[3] != found[0]
