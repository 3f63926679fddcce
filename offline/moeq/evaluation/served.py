"""Asks vLLM, so that what is measured is what users will get."""

from typing import Any

import torch

from moeq.errors import MoeqError
from moeq.evaluation.scores import TopOutput

TOP_TOKENS = 64
"""Likeliest tokens that vLLM is asked for at each place."""


def outputs(model: str, tokens: torch.Tensor, dtype: str) -> list[TopOutput]:
    """Return what a model says to each sequence under vLLM.

    Args:
        model: Folder of a packed checkpoint.
        tokens: int64 [n, L].
        dtype: As ``vllm serve --dtype`` takes it.

    Raises:
        MoeqError: vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise MoeqError(
            f"`backend` vllm: {error}; install vLLM, as in pip install 'vllm-moeq[cpu]'"
        ) from error
    llm = LLM(
        model=model, dtype=dtype, max_model_len=tokens.shape[1] + 1, max_logprobs=TOP_TOKENS,
        enable_prefix_caching=False,
    )  # fmt: skip
    try:
        answers = llm.generate(
            [{"prompt_token_ids": sequence} for sequence in tokens.tolist()],
            SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=TOP_TOKENS),
        )
    finally:
        # Left to the end of the process, vLLM's monitor thread races with Python's own end, which
        # at times aborts: exit status 134 after good figures.
        llm.llm_engine.engine_core.shutdown()
    return [
        _read(sequence, answer.prompt_logprobs[1:])
        for sequence, answer in zip(tokens.tolist(), answers, strict=True)
    ]


def _read(sequence: list[int], places: list[dict[int, Any]]) -> TopOutput:
    """Take a dict from token to log-probability and rank for each token but the first."""
    top, values, following = [], [], []
    for token, place in zip(sequence[1:], places, strict=True):
        # The token that follows comes on top of the likeliest ones if it is none of them.
        ranked = sorted(place, key=lambda other: place[other].rank)[:TOP_TOKENS]
        top.append(ranked)
        values.append([place[other].logprob for other in ranked])
        following.append([place[token].logprob])
    return TopOutput(torch.tensor(top), torch.tensor(values), torch.tensor(following))
