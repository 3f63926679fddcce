"""Perplexity of a text under a model that a vLLM server is serving.

    python examples/perplexity.py http://127.0.0.1:8000 TEXT_FILE [--tokens 8192]

Prints one number. The text is cut into windows that do not overlap; the server returns the
log-probability of every token of a window but its first.
"""

import argparse
import json
import math
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serving import urlopen

WINDOW = 256
CONCURRENT_REQUESTS = 8
TIMEOUT_SECONDS = 1800


def call(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST a JSON object and return the answer."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer: dict[str, Any] = json.loads(urlopen(request, TIMEOUT_SECONDS))
    return answer


def window_logprobs(server: str, model: str, tokens: list[int]) -> list[float]:
    """Return the log-probability of each token of a window but the first."""
    answer = call(
        f"{server}/v1/completions",
        {"model": model, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0},
    )
    entries = answer["choices"][0]["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for token, entry in zip(tokens[1:], entries, strict=True)]


def perplexity(server: str, text: str, max_tokens: int) -> float:
    """Return exp of the mean negative log-likelihood of the text's first ``max_tokens`` tokens."""
    model = json.loads(urlopen(f"{server}/v1/models", TIMEOUT_SECONDS))["data"][0]["id"]
    # Tokens of English text have four characters on average: this much is plenty.
    answer = call(
        f"{server}/tokenize",
        {"model": model, "prompt": text[: 8 * max_tokens], "add_special_tokens": False},
    )
    tokens = answer["tokens"][:max_tokens]
    windows = [tokens[start : start + WINDOW] for start in range(0, len(tokens), WINDOW)]
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        scored = pool.map(lambda window: window_logprobs(server, model, window), windows)
        logprobs = [value for window in scored for value in window]
    return math.exp(-sum(logprobs) / len(logprobs))


def reference_perplexity(model: str, text: str, max_tokens: int) -> float:
    """Return the same for a 16-bit model, computed by transformers in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(model)(text[: 8 * max_tokens], add_special_tokens=False)
    tokens = torch.tensor(encoded["input_ids"][:max_tokens])
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    if torch.cuda.is_available():
        tokens, network = tokens.cuda(), network.cuda()
    logprobs = []
    with torch.inference_mode():
        for window in tokens.split(WINDOW):
            predicted = network(window[None, :-1]).logits[0].float().log_softmax(-1)
            logprobs.append(predicted.gather(1, window[1:, None]).flatten())
    return math.exp(-torch.cat(logprobs).mean().item())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", help="address of the server")
    parser.add_argument("text", type=Path, help="text file")
    parser.add_argument("--tokens", type=int, default=8192, help="length (default 8192 tokens)")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    print(f"{perplexity(options.server, text, options.tokens):.4f}")


if __name__ == "__main__":
    main()
