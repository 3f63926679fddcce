"""``vllm serve --quantization moeq`` as a user runs it, over HTTP."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from perplexity import call

from support.engine import NEW_TOKENS, PROMPTS, Completion, assert_same, run_transformers
from support.packed import pack_mixed
from support.reference import dequantize_checkpoint
from support.server import serve

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_concurrent_requests_over_http(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_mixed(tiny_model("qwen3_moe"), tmp_path / "packed")
    expected = run_transformers(dequantize_checkpoint(packed, tmp_path / "plain"))

    def complete(prompt: list[int]) -> Completion:
        answer = call(
            f"{address}/v1/completions",
            {
                "model": str(packed),
                "prompt": prompt,
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 0,
                "prompt_logprobs": 0,
                "return_token_ids": True,
            },
        )
        choice = answer["choices"][0]
        prompt_logprobs = [
            entry[str(token)]["logprob"]
            for token, entry in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
        ]
        return Completion(
            choice["token_ids"], prompt_logprobs, choice["logprobs"]["token_logprobs"]
        )

    with (
        serve(
            packed, tmp_path / "log", "--quantization", "moeq", "--dtype", "float32",
            "--enforce-eager",
        ) as address,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):  # fmt: skip
        completions = list(pool.map(complete, PROMPTS))
        _check_the_test_under_load(str(packed), address, monkeypatch)

    assert_same(completions, expected)


def _check_the_test_under_load(model: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let its clients ask a server that does no wrong: answers, streams, dropped and bad ones."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import under_load

    monkeypatch.setattr(under_load, "PROMPTS", 6)
    monkeypatch.setattr(under_load, "LONG", 80)
    monkeypatch.setattr(under_load, "NEW_TOKENS", 8)
    load = under_load.Load(model, 256)
    load.address = address
    load.learn()
    clients = [threading.Thread(target=load.client, args=(seed,)) for seed in range(4)]
    for client in clients:
        client.start()
    while load.counts.total() < 60 and any(client.is_alive() for client in clients):
        time.sleep(0.02)
    load.over.set()
    for client in clients:
        client.join()
    assert under_load.verdict(load.counts, [(0, 1)] * 2).startswith("Answers: met"), load.counts
    for what in ("answers", "streams", "dropped streams", "bad requests"):
        assert any(name.startswith(what) for name in load.counts), load.counts
