"""``vllm serve --quantization moeq`` as a user runs it, over HTTP."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from perplexity import call

from support.engine import NEW_TOKENS, PROMPTS, Completion, assert_same, run_transformers
from support.packed import pack_mixed
from support.reference import dequantize_checkpoint
from support.server import serve

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_concurrent_requests_over_http(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
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

    assert_same(completions, expected)
