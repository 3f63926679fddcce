"""Runs prompts through a real vLLM engine in a process of its own.

Importing vLLM takes much longer than a tiny model does. So a fork server imports it once, and
engines are children of it, with an environment of their own.
"""

import json
import math
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

PROMPTS = [list(text.encode()) for text in ("def forward", "The expert", "a", "quantize me!" * 4)]
"""Token ids: with the tests' byte-level tokenizer any id below the vocabulary will do."""
NEW_TOKENS = 12
LOGPROB_TOLERANCE = 1e-3
TWO_RANKS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
}
"""Options of :func:`launch` for tensor parallelism on two cores."""
TESTS = Path(__file__).parents[1]


Logits = Callable[[list[int]], torch.Tensor]
"""Token ids to logits [tokens, vocabulary]."""
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


class Exit(NamedTuple):
    """How a process ended: its exit code, and its standard output and error."""

    returncode: int
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


def in_fork(
    function: Callable[..., None], *arguments: Any, environment: dict[str, str] | None = None
) -> Exit:
    """Run a function in a new process that has imported vLLM, as far as the fork server did.

    Args:
        function: Of a module that the process can import.
        arguments: Sent to the process.
        environment: Additional environment variables, for what reads them after the imports.
    """
    variables = engine_environment(PYTHONPATH=_python_path(), **(environment or {}))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        process = _fork_server().Process(
            target=_in_child, args=(function, arguments, variables, str(log))
        )
        process.start()
        process.join(600)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{function.__name__} takes longer than 600 s: {log.read_text()}")
        return Exit(process.exitcode, log.read_text(errors="replace"))


def _python_path() -> str:
    return os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])


@cache
def _fork_server() -> ForkServerContext:
    """Start the fork server of this process; it ends with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.engine_main"])
    with patch.dict(os.environ, engine_environment(PYTHONPATH=_python_path())):
        forkserver.ensure_running()
    return context


def _in_child(
    function: Callable[..., None], arguments: tuple[Any, ...], variables: dict[str, str], log: str
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(variables)
    function(*arguments)


def launch(
    model: Path,
    *,
    result: Path = Path(os.devnull),
    corruptions: list[Corruption] | None = None,
    actions: list[Action] | None = None,
    prompts: list[list[int]] = PROMPTS,
    prompt_logprobs: bool = True,
    spawn_workers: bool = False,
    environment: dict[str, str] | None = None,
    **llm_options: Any,
) -> Exit:
    """Run the engine process to its end.

    Args:
        model: Checkpoint folder.
        result: File for what ``engine_main`` finds.
        corruptions: See ``engine_main``.
        actions: See ``engine_main``.
        prompts: Token ids.
        prompt_logprobs: Whether to ask for log-probabilities of the prompts.
        spawn_workers: Whether ranks import vLLM anew, as vLLM has it on CPUs; else they are forked.
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
    if "kv_lora_rank" in json.loads(Path(model, "config.json").read_text()):
        # vLLM's multi-head latent attention for AMX takes nothing but bfloat16.
        of_drafts = options.get("speculative_config")
        for of_model in filter(None, (options, of_drafts)):
            of_model.setdefault("attention_backend", "CPU_MLA")
    job = {
        "model": str(model),
        "llm": options,
        "corruptions": corruptions or [],
        "actions": actions or [],
        "prompts": prompts,
        "prompt_logprobs": 0 if prompt_logprobs else None,
        "spawn_workers": spawn_workers,
    }
    return in_fork(run_engine_job, job, str(result), environment=environment)


def run_engine_job(job: dict[str, Any], result: str) -> None:
    """Do the job of ``engine_main``, which only processes that run engines import."""
    from support.engine_main import run_job

    Path(result).write_text(json.dumps(run_job(job)))


def run_engine(model: Path, **options: Any) -> EngineRun:
    """Run :data:`PROMPTS` or others; arguments as in :func:`launch`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result")
        process = launch(model, result=file, **options)
        assert process.returncode == 0, process.log[-9000:]
        result = json.loads(file.read_text())
    return EngineRun(
        [[Completion(**entry) for entry in entries] for entries in result["completions"]],
        result["refusals"],
        result["buffers"],
        result["metrics"],
        process.log,
    )


def run_two_engines(model: Path, **options: Any) -> list[EngineRun]:
    """Run two ranks of data parallelism; arguments as in :func:`launch`.

    The first gets the first of :data:`PROMPTS`, the second all others.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(rank: int) -> EngineRun:
        variables = {"SIZE": 2, "RANK": rank, "RANK_LOCAL": rank, "MASTER_PORT": port}
        prompts = PROMPTS[1:] if rank else PROMPTS[:1]
        environment = {f"VLLM_DP_{name}": str(value) for name, value in variables.items()}
        return run_engine(model, prompts=prompts, environment=environment, **options)

    _fork_server()  # before two threads want it
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def text_logits(model: Path) -> Logits:
    """Return a function that gives the logits of transformers in float32."""
    from support.models import load_model  # the engine process does without transformers' models

    network = load_model(model, attn_implementation="eager").eval()

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = network(torch.tensor([ids])).logits[0]
        return result

    return logits


def run_transformers(model: Path) -> list[Completion]:
    """Run :data:`PROMPTS` through transformers in float32."""
    return generate(text_logits(model), PROMPTS)


def generate(logits_of: Logits, prompts: list[list[int]]) -> list[Completion]:
    """Continue prompts with the likeliest tokens."""
    completions = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(logits_of(ids)[-1].argmax()))
        logits = logits_of(ids)
        logprobs = torch.log_softmax(logits.double(), -1)
        values = [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
        split = len(prompt) - 1
        completions.append(Completion(ids[len(prompt) :], values[:split], values[split:]))
    return completions


def assert_same(
    actual: list[Completion],
    expected: list[Completion],
    tolerance: float = LOGPROB_TOLERANCE,
    ties: int = 0,
) -> None:
    """Compare completions: equal tokens, log-probabilities within the tolerance.

    Args:
        actual: What an engine said.
        expected: What it was to say.
        tolerance: Largest difference of a log-probability.
        ties: How many of all tokens may be off: the router finds two experts equally good for them.
    """
    differences: list[float] = []
    for found, wanted in zip(actual, expected, strict=True):
        assert found.tokens == wanted.tokens
        for name in ("prompt_logprobs", "logprobs"):
            values = zip(getattr(found, name), getattr(wanted, name), strict=True)
            differences += [abs(ours - theirs) for ours, theirs in values]
    largest = sorted(differences, key=lambda value: (math.isnan(value), value), reverse=True)
    assert all(value <= tolerance for value in largest[ties:]), largest[:9]


def assert_likely(
    actual: list[Completion], logits_of: Logits, prompts: list[list[int]] = PROMPTS
) -> None:
    """Hold answers in bfloat16 against float32 logits of the same tokens.

    Rounding decides between tokens that are nearly equal, so answers may differ from the likeliest
    ones. But each token must nearly be that, and log-probabilities nearly the same: those of vLLM
    with a dequantized Qwen3.5-MoE are off by 0.02 on average, and by 0.5 at one of its tokens.
    """
    errors, behind_best = [], []
    for prompt, found in zip(prompts, actual, strict=True):
        ids = [*prompt, *found.tokens]
        logprobs = torch.log_softmax(logits_of(ids)[:-1].double(), -1)
        wanted = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        errors.append((torch.tensor([*found.prompt_logprobs, *found.logprobs]) - wanted).abs())
        behind_best.append((logprobs.amax(1) - wanted)[len(prompt) - 1 :])
    assert torch.cat(errors).mean() < 0.05
    assert torch.cat(errors).max() < 1
    assert torch.cat(behind_best).max() < 0.5
