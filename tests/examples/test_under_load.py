"""The test under load: what clients count, against a server that can answer wrongly."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
TOKENS = [f"t{number}" for number in range(24)]
RIGHT = {
    "answers as of the quiet server",
    "streams as of the quiet server",
    "dropped streams as of the quiet server",
    "bad requests, refused",
}


@pytest.fixture
def under_load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import under_load

    monkeypatch.setattr(under_load, "RETRY_SECONDS", 0.01)
    return under_load


def _part(tokens: list[str] | None, shift: float = 0.0) -> dict[str, Any]:
    """Return an answer of such tokens, or a part of a stream; of None a malformed one."""
    if tokens is None:
        return {"choices": [{"logprobs": None}]}
    found = {
        "tokens": tokens,
        "token_logprobs": [shift - 0.5] * len(tokens),
        "top_logprobs": [{token: shift - 0.5, "other": -2.0} for token in tokens],
    }
    return {"choices": [{"logprobs": found}]}


class _Handler(BaseHTTPRequestHandler):
    """Answers like vLLM, unless the server has other ``tokens``, ``shift`` or ``status``.

    Calls ``asked`` of the server before it answers.
    """

    server: Any
    protocol_version = "HTTP/1.0"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        bad = "logprobs" not in body
        self.server.asked()
        self.send_response(400 if bad else self.server.status)
        self.end_headers()
        tokens = self.server.tokens
        if not body.get("stream"):
            self.wfile.write(json.dumps(_part(tokens, self.server.shift)).encode())
            return
        for part in [None] if tokens is None else [[token] for token in tokens]:
            data = json.dumps(_part(part, self.server.shift)).encode()
            self.wfile.write(b"data: " + data + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Any]:
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    found.tokens, found.shift, found.status, found.asked = TOKENS, 0.0, 200, lambda: None
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def _load(under_load: ModuleType, server: Any) -> Any:
    load = under_load.Load("model", 512)
    load.address = f"http://127.0.0.1:{server.server_port}"
    load.learn()
    return load


def _run(load: Any, answers: int = 60) -> set[str]:
    """Let a client ask so often; return the names of what it counted."""
    load.counts.clear()
    load.over.clear()
    client = threading.Thread(target=load.client, args=(0,))
    client.start()
    deadline = time.monotonic() + 30
    while load.counts.total() < answers:
        assert client.is_alive() and time.monotonic() < deadline, load.counts
        time.sleep(0.005)
    load.over.set()
    client.join()
    return set(load.counts)


def test_right_answers_streams_and_refusals_are_counted_as_such(
    under_load: ModuleType, server: Any
) -> None:
    load = _load(under_load, server)
    assert _run(load) == RIGHT
    assert len(load.seconds) == sum(
        load.counts[name] for name in RIGHT if name.startswith(("answers", "streams"))
    )


@pytest.mark.parametrize(
    ("tokens", "shift", "status", "counted"),
    [
        (TOKENS[:-1], 0.0, 200, {"answers that DIFFER", "streams that DIFFER"}),
        ([*TOKENS[:-1], "?"], 0.0, 200, {"answers that DIFFER", "streams that DIFFER"}),
        (TOKENS, 0.01, 200, {f"{what} that DIFFER" for what in ("answers", "streams")}),
        (["?"], 0.0, 200, {"dropped streams that DIFFER"}),
        ([], 0.0, 200, {f"{way} that DIFFER" for way in ("answers", "streams", "dropped streams")}),
        (TOKENS, 0.0, 500, {"errors"}),
        (None, 0.0, 200, {"MALFORMED answers"}),
    ],
)
def test_wrong_answers_are_counted_and_clients_go_on(
    tokens: list[str] | None,
    shift: float,
    status: int,
    counted: set[str],
    under_load: ModuleType,
    server: Any,
) -> None:
    load = _load(under_load, server)
    server.tokens, server.shift, server.status = tokens, shift, status
    found = _run(load)
    assert counted <= found
    assert not found & {"answers as of the quiet server", "streams as of the quiet server"}
    assert "missed" in under_load.verdict(load.counts, [(0.0, 1.0)] * 2).partition("Memory")[0]


def test_what_is_refused_while_the_server_is_down_is_a_retry(
    under_load: ModuleType, server: Any
) -> None:
    load = _load(under_load, server)
    server.status = 500
    load.down.set()
    assert _run(load, 30) == {"retries while the server was down", "bad requests, refused"}


def test_a_request_that_began_while_the_server_was_down_is_a_retry(
    under_load: ModuleType, server: Any
) -> None:
    load = _load(under_load, server)
    server.status = 500
    load.down.set()

    def comes_back() -> None:
        load.down.clear()
        load.over.set()

    server.asked = comes_back
    load.client(0)
    assert load.counts == {"retries while the server was down": 1}


def test_streams_end_as_they_say(under_load: ModuleType) -> None:
    events = [
        line
        for token in TOKENS
        for line in (b"data: " + json.dumps(_part([token])).encode() + b"\n", b"\n")
    ]
    done = b"data: [DONE]\n"
    whole = under_load.tokens_of(_part(TOKENS))
    assert [token.text for token in whole] == TOKENS
    assert whole[0] == ("t0", -0.5, -2.0)
    assert under_load.streamed([*events, done]) == whole
    assert under_load.streamed(events, 5) == whole[:5]
    for cut in ([], events, events[:-2], [*events, b"data: [DO"], [*events[:-2], events[-2][:9]]):
        with pytest.raises(http.client.IncompleteRead):
            under_load.streamed(cut)
    for line in (b"error: no\n", b'data: {"error": "no"}\n'):
        with pytest.raises((KeyError, ValueError)):
            under_load.streamed([events[0], line, done])


def test_answers_may_part_at_a_tie_only(under_load: ModuleType) -> None:
    token = under_load.Token
    quiet = [token("a", -0.1, -3.0), token("b", -0.7, -0.7005), token("c", -0.1, -3.0)]
    tie = [quiet[0], token("x", -0.7005, -0.7), token("y", -5.0, -6.0)]
    other = [token("z", -0.1, -3.0), *quiet[1:]]
    unlikely = [quiet[0], token("x", -9.0, -0.7), quiet[2]]
    assert under_load.compared(quiet, quiet) == "as of the quiet server"
    assert under_load.compared(tie, quiet) == "that part at a tie"
    assert under_load.compared(other, quiet) == "that DIFFER"
    assert under_load.compared(unlikely, quiet) == "that DIFFER"
    assert under_load.compared(tie[:2], quiet) == "that DIFFER"
    assert under_load.compared(quiet[:2], quiet) == "that DIFFER"
    assert under_load.compared([*quiet, quiet[0]], quiet) == "that DIFFER"


def test_growth_is_that_of_the_second_half(under_load: ModuleType) -> None:
    memory = under_load.Memory()
    for number in range(100):  # 360 MB an hour at first, then 36 with noise of one MB
        seconds = 5.0 * number
        steady = min(seconds, 250.0) / 10 + max(seconds - 250.0, 0.0) / 100
        memory.samples.append((seconds, 1000 + steady + (-1) ** number * (number >= 50)))
    slope, error = memory.slope()
    assert abs(slope - 36) < 3 * error
    assert 3 < error < 12


def test_the_verdict_says_what_was_missed(under_load: ModuleType) -> None:
    right = dict.fromkeys(RIGHT | {"retries while the server was down"}, 7)
    met = under_load.verdict(right | {"streams that part at a tie": 2}, [(2.0, 0.7), (-0.0, 0.0)])
    assert met == (
        "Answers: met, no error, none that differs, every bad request refused. Memory before the "
        "kill: met, +2.0 ± 0.7 MB an hour. Memory at the end: met, -0.0 ± 0.0 MB an hour. At most "
        "10 MB an hour was wanted, by 3 standard errors."
    )
    missed = under_load.verdict(right | {"errors": 3}, [(83.4, 3.7), (400.0, 150.0)])
    assert missed == (
        "Answers: missed, 3 errors. Memory before the kill: missed, +83.4 ± 3.7 MB an hour. Memory "
        "at the end: not decided, too noisy, run longer: +400.0 ± 150.0 MB an hour. At most 10 MB "
        "an hour was wanted, by 3 standard errors."
    )
    for wrong in ("answers that DIFFER", "MALFORMED answers", "bad requests, ANSWERED"):
        assert f"missed, 1 {wrong}." in under_load.verdict(right | {wrong: 1}, [(0.0, 1.0)] * 2)


@pytest.mark.parametrize(
    ("slope", "error", "outcome"),
    [
        (9.0, 0.3, "met"),
        (-400.0, 100.0, "met"),
        (9.0, 0.4, "not decided"),
        (0.0, 4.0, "not decided"),
        (10.5, 4.0, "not decided"),
        (10.5, 3.0, "missed"),
        (400.0, 100.0, "missed"),
        (float("nan"), float("nan"), "not decided"),
    ],
)
def test_growth_is_met_or_missed_only_where_noise_lets_it_be_told(
    slope: float, error: float, outcome: str, under_load: ModuleType
) -> None:
    said = under_load.verdict({}, [(slope, error), (0.0, 0.0)])
    assert f"Memory before the kill: {outcome}, " in said
