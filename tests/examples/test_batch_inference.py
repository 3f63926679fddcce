"""The example of batch inference, through a real engine that is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from support.engine import NEW_TOKENS, PROMPTS, engine_environment
from support.models import load_model
from support.packed import pack_mixed
from support.reference import dequantize_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "batch_inference.py"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
ROUNDS = 8
BAD = {
    "not json": "JSONDecodeError",
    '{"prompt": "a", "colour": 1}': "unknown field 'colour'",
    '{"id": "both", "prompt": "a", "messages": []}': "either a prompt or messages",
    json.dumps({"id": "long", "prompt": "a" * 200}): "128",
    json.dumps({"id": "\ud83d", "prompt": ["a"]}): "a prompt is a string",
    json.dumps({"messages": [{"role": "user", "content": [{"text": "a"}]}]}): "both strings",
    '{"prompt": "\xff"}': "UnicodeDecodeError",
}


@pytest.mark.slow
@pytest.mark.vllm
def test_a_killed_run_goes_on_without_a_duplicate_or_a_gap(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    packed = pack_mixed(tiny_model("mixtral"), tmp_path / "packed")
    (packed / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    texts = [bytes(tokens).decode() for tokens in PROMPTS]
    good: list[dict[str, Any]] = []
    for number in range(ROUNDS):
        good += [{"id": f"p{number}.{i}", "prompt": text} for i, text in enumerate(texts)]
        good += [{"messages": [{"role": "user", "content": text}]} for text in texts]
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    requests.write_bytes("\n".join([*BAD, "", *map(json.dumps, good)]).encode("latin-1") + b"\n")
    command = [
        sys.executable, str(EXAMPLE), str(packed), str(requests), str(results), "--dtype=float32",
        f"--max-tokens={NEW_TOKENS}", "--max-model-len=128", "--enforce-eager", "--in-flight=2",
    ]  # fmt: skip
    environment = engine_environment(VLLM_ENABLE_V1_MULTIPROCESSING="1")

    part = tmp_path / "results.jsonl.part"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        while process.poll() is None and not (part.exists() and len(_lines(part)) > len(BAD) + 6):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = _lines(part)[1:]
    assert 0 < len(kept) < len(good), (tmp_path / "log").read_text()[-3000:]
    assert not results.exists()
    with part.open("a") as file:
        file.write('{"line": 99, "te')  # the kill can come in the middle of a line

    other = subprocess.run(
        [*command, "--temperature=1"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "of a run with another temperature" in other.stderr
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exited unexpectedly" not in done.stderr  # so says vLLM of an engine nobody shut down

    found = [json.loads(line) for line in _lines(results)]
    assert not part.exists()
    first = len(BAD) + 2
    assert [entry["line"] for entry in found] == list(range(first, first + len(good)))
    assert [entry.get("id") for entry in found] == [entry.get("id") for entry in good]
    finished = [entry for entry in map(json.loads, kept) if "error" not in entry]
    assert finished and all(entry in found for entry in finished)
    model = load_model(dequantize_checkpoint(packed, tmp_path / "plain"))
    for i, entry in enumerate(found):
        prompt = tokenizer(texts[i % len(texts)], return_tensors="pt").input_ids
        (tokens,) = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[
            :, prompt.shape[1] :
        ]
        assert entry["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert entry["completion_tokens"] == len(tokens)
    failed = [json.loads(line) for line in _lines(tmp_path / "results.errors.jsonl")]
    assert [entry["line"] for entry in failed] == list(range(1, len(BAD) + 1))
    assert [entry.get("id") for entry in failed] == [
        None,
        None,
        "both",
        "long",
        "\ud83d",
        None,
        None,
    ]
    for entry, message in zip(failed, BAD.values(), strict=True):
        assert message in entry["error"]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
