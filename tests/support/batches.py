"""Runs the example of batch inference with answers that need no engine; can be killed on the way.

    python batches.py FOLDER NUMBER

kills the run before the NUMBER-th time that it opens, renames or removes one of its files. A
journal that ends between those has a test of its own.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import batch_inference as batch_inference

STEPS = ("open", "os.rename", "os.remove")


def options_of(folder: Path, **others: object) -> argparse.Namespace:
    """Return the options of a run in a folder that has ``requests.jsonl`` and ``model``."""
    options: dict[str, object] = {
        "requests": folder / "requests.jsonl", "results": folder / "results.jsonl",
        "model": str(folder / "model"), "revision": None, "tokenizer": None,
        "tokenizer_revision": None, "max_tokens": 4, "temperature": 0.0, "seed": 0,
        "dtype": "auto", "kv_cache_dtype": "auto", "quantization": None, "load_format": "auto",
        "max_model_len": None, "hf_overrides": {}, "vllm_version": "0.32.0",
    }  # fmt: skip
    return argparse.Namespace(**options | others)


async def answer(options: argparse.Namespace, journal: batch_inference.Journal, total: int) -> None:
    """Answer all requests that the journal does not have, the last first; each third fails."""
    assert total - len(journal) > 0
    for number, text in reversed([*batch_inference.numbered(options.requests)]):
        if number not in journal:
            found = {"error": "bad"} if number % 3 == 0 else {"text": text.decode()}
            journal.add({"line": number} | found)


def complete(folder: Path, run: batch_inference.Run = answer, **others: object) -> None:
    """Complete the requests of a folder, or go on with that."""
    batch_inference.complete_all(options_of(folder, **others), run)


def main() -> None:
    """Run, and be killed."""
    folder, last, steps = Path(sys.argv[1]), int(sys.argv[2]), 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event in STEPS and str(arguments[0]).startswith(str(folder / "results")):
            steps += 1
            if steps == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    complete(folder)


if __name__ == "__main__":
    main()
