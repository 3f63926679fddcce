"""Runs prompts through a real vLLM engine in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

PROMPTS = [list(text.encode()) for text in ("def forward", "The expert", "a", "quantize me!" * 4)]
"""Token ids: with the tests' byte-level tokenizer any id below the vocabulary will do."""
NEW_TOKENS = 12
LOGPROB_TOLERANCE = 1e-3
RESULT_MARK = "engine result: "
"""Starts the line of output that holds the result; vLLM's own lines are all around it."""


Corruption = tuple[str, list[int], int]
Action = tuple[str, str | None]


class Completion(NamedTuple):
    """Greedy continuation of one prompt.

    Attributes:
        tokens: Generated token ids.
        prompt_logprobs: Log-probability of each prompt token but the first.
        logprobs: Log-probability of each generated token.
    """

    tokens: list[int]
    prompt_logprobs: list[float]
    logprobs: list[float]


class EngineRun(NamedTuple):
    """What an engine process gave.

    Attributes:
        completions: One list for each round: as loaded, then after each of ``corruptions`` and
            after each of ``actions`` that succeeded.
        refusals: Messages of the actions that failed.
        buffers: For each rank, parameter name of an experts layer to its bytes.
        metrics: vLLM's counters, if it was told to count.
        log: Standard output and error.
    """

    completions: list[list[Completion]]
    refusals: list[str]
    buffers: list[dict[str, int]]
    metrics: dict[str, float]
    log: str


def engine_environment(**extra: str) -> dict[str, str]:
    """Return the environment in which the tests run vLLM."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The tests ask workers about their buffers, which sends a function to them.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        **extra,
    }


def launch(
    model: Path,
    *,
    corruptions: list[Corruption] | None = None,
    actions: list[Action] | None = None,
    prompt_logprobs: bool = True,
    environment: dict[str, str] | None = None,
    **llm_options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run the engine process to its end.

    Args:
        model: Checkpoint folder.
        corruptions: See ``engine_main``.
        actions: See ``engine_main``.
        prompt_logprobs: Whether to ask for log-probabilities of the prompts.
        environment: Additional environment variables.
        llm_options: For ``vllm.LLM``.
    """
    options = {
        "max_model_len": 128,
        "max_num_seqs": 4,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        **llm_options,
    }
    job = {
        "model": str(model),
        "llm": options,
        "corruptions": corruptions or [],
        "actions": actions or [],
        "prompt_logprobs": 0 if prompt_logprobs else None,
    }
    return subprocess.run(
        [sys.executable, "-m", "support.engine_main", json.dumps(job)],
        capture_output=True,
        text=True,
        timeout=600,
        env=engine_environment(PYTHONPATH=str(Path(__file__).parents[1]), **(environment or {})),
        check=False,
    )


def run_engine(model: Path, **options: Any) -> EngineRun:
    """Run :data:`PROMPTS`; arguments as in :func:`launch`."""
    process = launch(model, **options)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    marked = [line for line in process.stdout.splitlines() if line.startswith(RESULT_MARK)]
    result = json.loads(marked[0].removeprefix(RESULT_MARK))
    return EngineRun(
        [[Completion(**entry) for entry in entries] for entries in result["completions"]],
        result["refusals"],
        result["buffers"],
        result["metrics"],
        process.stdout + process.stderr,
    )


def run_transformers(model: Path) -> list[Completion]:
    """Run :data:`PROMPTS` through transformers in float32."""
    from support.models import load_model  # the engine process does without transformers' models

    network = load_model(model, attn_implementation="eager").eval()
    completions = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
            logits = network(torch.tensor([ids])).logits[0]
        logprobs = torch.log_softmax(logits.double(), -1)
        values = [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
        split = len(prompt) - 1
        completions.append(Completion(ids[len(prompt) :], values[:split], values[split:]))
    return completions


def assert_same(
    actual: list[Completion], expected: list[Completion], tolerance: float = LOGPROB_TOLERANCE
) -> None:
    """Compare completions: equal tokens, log-probabilities within the tolerance."""
    for found, wanted in zip(actual, expected, strict=True):
        assert found.tokens == wanted.tokens
        for name in ("prompt_logprobs", "logprobs"):
            torch.testing.assert_close(
                torch.tensor(getattr(found, name)),
                torch.tensor(getattr(wanted, name)),
                atol=tolerance,
                rtol=0,
            )
