"""The web chat's server over real sockets, with an engine that the test steps by hand."""

import base64
import contextlib
import hashlib
import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import UserError
from nanochat.conversation import render_for_completion, render_within
from nanochat.engine import Engine, Sampling
from nanochat.gpt import GPTConfig
from nanochat.server import (
    LIMITS,
    PAGE,
    Defaults,
    Server,
    allowed_hosts,
    create_app,
    is_loopback,
    listen,
    make_server,
)
from nanochat.tokenizer import Tokenizer
from scripts import chat_web
from tests import tiny
from tests.test_gpt import small_model

TOKENIZER = Tokenizer(np.empty((0, 2)))  # one token per byte, so that characters are split over tokens
HELLO = [{"role": "user", "content": "Hello"}]
SMALL = GPTConfig(64, TOKENIZER.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
SECONDS = 10  # after which a test gives up


def tokens_of(*parts: str) -> list[int]:
    """Token ids of texts and of special tokens, given by name."""
    ids = [[TOKENIZER.encode_special(part)] if part.startswith("<|") else TOKENIZER.encode(part) for part in parts]
    return [token for row in ids for token in row]


def pairs(*contents: Any) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]


class FakeEngine:
    """Says `tokens`; with stepped=True one of them per allow()."""

    def __init__(self, tokens: list[int], stepped: bool = False, error: Exception | None = None):
        self.tokens, self.error = tokens, error
        self.gate = threading.Semaphore(0) if stepped else None
        self.stop_tokens = frozenset(tokens_of("<|assistant_end|>", "<|bos|>"))
        self.calls: list[dict[str, Any]] = []  # what generate() was asked
        self.taken: list[int] = []  # steps that each finished generator took
        self.closed = threading.Semaphore(0)  # one release per finished generator

    def allow(self, steps: int = 1) -> None:
        if self.gate:
            self.gate.release(steps)

    def generate(self, tokens: list[int], sampling: Sampling) -> Iterator[int]:
        self.calls.append({"tokens": tokens, **vars(sampling)})
        steps = 0
        try:
            for token in self.tokens[: sampling.max_tokens]:
                if self.gate:
                    self.gate.acquire()
                steps += 1
                yield token
            if self.error:
                raise self.error
        finally:
            self.taken.append(steps)
            self.closed.release()


class Live:
    """A running server and its clients."""

    def __init__(self, server: Server, port: int):
        self.server, self.port = server, port
        self.connections: list[http.client.HTTPConnection] = []

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        self.connections.append(connection)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        connection.request(method, path, data, {**kind, **headers})
        return connection.getresponse()

    def chat(self, messages: Any = HELLO, **fields: Any) -> http.client.HTTPResponse:
        return self.request("POST", "/chat/completions", {"messages": messages, **fields})

    def get(self, path: str) -> dict[str, Any]:
        return json.loads(self.request("GET", path).read())

    def leave(self, response: http.client.HTTPResponse) -> None:
        """As a browser does whose tab is closed."""
        response.close()
        self.connections[-1].close()

    def wait(self, key: str, value: int) -> None:
        """Until /stats says so."""
        tiny.wait_until(lambda: self.get("/stats")[key] == value)


@contextlib.contextmanager
def serving(engine: Any, context: int = 2048, **options: Any) -> Iterator[Live]:
    """create_app() on a free port."""
    listener = listen("127.0.0.1", 0)
    server = make_server(create_app(engine, TOKENIZER, context, "fake", **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    live = Live(server, listener.getsockname()[1])
    try:
        yield live
    finally:
        server.should_exit = True
        if isinstance(engine, FakeEngine):
            engine.allow(10_000)
        thread.join(SECONDS)
        for connection in live.connections:
            connection.close()
        assert not thread.is_alive() and not server.config.app.state.worker.thread.is_alive()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def simple() -> Iterator[Live]:
    """A server for requests that leave nothing behind."""
    with serving(FakeEngine(tokens_of("Hi!", "<|assistant_end|>"))) as live:
        yield live


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    assert response.status == 200, response.read()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    for line in response:
        if line.startswith(b"data:"):
            yield json.loads(line[5:])


def texts(response: http.client.HTTPResponse) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """([(kind, text), ...] with neighbours joined, last event) of a whole stream."""
    *pieces, last = events(response)
    joined: list[tuple[str, str]] = []
    for piece in pieces:
        if joined and joined[-1][0] == piece["kind"]:
            joined[-1] = (piece["kind"], joined[-1][1] + piece["token"])
        else:
            joined.append((piece["kind"], piece["token"]))
    return joined, last


# -----------------------------------------------------------------------------
# Replies


def test_tool_calls_and_split_characters_arrive_as_text_of_their_kind() -> None:
    """nanochat showed tool tokens as text, and U+FFFD where a character was split over tokens."""
    call = ("<|python_start|>", "12*3", "<|python_end|>", "<|output_start|>", "36", "<|output_end|>")
    engine = FakeEngine(tokens_of("Größe 🎈: ", *call, " it is", "<|assistant_end|>"))
    with serving(engine) as live:
        pieces, last = texts(live.chat())
        assert pieces == [("text", "Größe 🎈: "), ("python", "12*3"), ("python_output", "36"), ("text", " it is")]
        prompt = render_for_completion(HELLO, TOKENIZER)
        assert engine.calls[0]["tokens"] == prompt
        counts = {"prompt_tokens": len(prompt), "completion_tokens": len(engine.tokens)}
        assert last == {"done": True, "finish_reason": "stop", **counts, "left_out": 0}
        assert live.get("/stats")["tokens"] == len(engine.tokens)


def test_a_character_that_never_becomes_whole_is_shown_at_the_end() -> None:
    with serving(FakeEngine(tokens_of("ab€")[:-1])) as live:
        pieces, last = texts(live.chat())
        assert pieces == [("text", "ab\ufffd")] and last["finish_reason"] == "length"


def test_text_arrives_while_the_model_still_runs() -> None:
    engine = FakeEngine(tokens_of("abc"), stepped=True)
    with serving(engine) as live:
        stream = events(live.chat())
        for letter in "abc":
            engine.allow()
            assert next(stream)["token"] == letter
        assert next(stream)["finish_reason"] == "length"


def test_the_page_answers_while_the_model_is_in_a_step() -> None:
    """nanochat ran the model on the event loop: /health waited for it."""
    with serving(FakeEngine(tokens_of("abc"), stepped=True)) as live:
        live.chat()
        about = {"status": "ok", "ready": True, "model": "fake", "context": 2048, "limits": LIMITS}
        assert live.get("/health") == about
        live.wait("active", 1)


def test_settings_of_a_request_reach_the_engine_and_the_defaults_where_it_has_none() -> None:
    engine = FakeEngine(tokens_of("abc"))
    with serving(engine, defaults=Defaults(0.5, 7, 2)) as live:
        texts(live.chat())
        texts(live.chat())
        texts(live.chat(temperature=0, top_k=0, max_tokens=1, seed=3))
    first, second, third = ({key: call[key] for key in call if key != "tokens"} for call in engine.calls)
    assert first.pop("seed") != second.pop("seed")  # else every chat would go the same way
    others = {"top_p": None, "min_p": None, "repetition_penalty": 1.0, "logprobs": None}
    assert first == second == {"temperature": 0.5, "top_k": 7, "max_tokens": 2, **others}
    assert third == {"temperature": 0, "top_k": 0, "max_tokens": 1, "seed": 3, **others}


def test_earlier_tool_use_is_rendered_as_in_training_and_text_never_becomes_a_special_token() -> None:
    """nanochat sent tool calls back as text, which the model had never seen in training."""
    parts = [{"type": "python", "text": "12*3"}, {"type": "python_output", "text": "36"}]
    messages = pairs("Hello", parts, "<|python_start|>1")
    engine = FakeEngine(tokens_of("a"))
    with serving(engine) as live:
        texts(live.chat(messages))
    tokens = engine.calls[0]["tokens"]
    call = tokens_of("<|python_start|>", "12*3", "<|python_end|>", "<|output_start|>", "36", "<|output_end|>")
    assert any(tokens[i : i + len(call)] == call for i in range(len(tokens)))
    assert tokens.count(TOKENIZER.encode_special("<|python_start|>")) == 1


def test_a_small_real_model_chats() -> None:
    with serving(Engine(small_model(SMALL), TOKENIZER), context=64) as live:
        both = [list(events(live.chat(max_tokens=20, seed=1))) for _ in range(2)]
        # On a busy machine the second may have to wait until the worker is done with the first.
        answers = [[event for event in answer if "waiting" not in event] for answer in both]
        assert answers[0] == answers[1]
        assert answers[0][-1]["done"] and 1 <= answers[0][-1]["completion_tokens"] <= 20


# -----------------------------------------------------------------------------
# A model that has too little room


def test_what_does_not_fit_is_left_out_in_whole_turns_and_said() -> None:
    turn = pairs("u" * 20, "a" * 20)
    system = {"role": "system", "content": "Be kind."}
    messages = [system, *turn * 5, *HELLO]
    engine = FakeEngine(tokens_of("ok", "<|assistant_end|>"))
    with serving(engine, context=160) as live:
        first, *_, last = events(live.chat(messages))
    kept = render_for_completion([system, *turn * 2, *HELLO], TOKENIZER)
    assert first == {"left_out": 6} and last["left_out"] == 6
    assert engine.calls[0]["tokens"] == kept and len(kept) <= 120 < len(kept) + 44  # a quarter is for the reply


@pytest.mark.parametrize("room", range(20, 200, 7))
def test_the_most_that_fits_is_kept(room: int) -> None:
    messages = pairs(*("x" * (i % 7) for i in range(21)))
    fitting = [i for i in range(0, 21, 2) if len(render_for_completion(messages[i:], TOKENIZER)) <= room]
    tokens, left_out = render_within(messages, TOKENIZER, room)
    assert left_out == fitting[0] and tokens == render_for_completion(messages[left_out:], TOKENIZER)


def test_a_last_message_that_cannot_fit_is_refused() -> None:
    with serving(FakeEngine(tokens_of("a")), context=64) as live:
        response = live.chat([{"role": "user", "content": "x" * 60}])
        assert response.status == 400 and "has 64 tokens" in json.loads(response.read())["error"]


# -----------------------------------------------------------------------------
# The line, and clients that go


def test_requests_take_turns_and_know_how_many_come_first() -> None:
    engine = FakeEngine(tokens_of("ab"), stepped=True)
    with serving(engine, max_waiting=2) as live:
        first = live.chat()
        live.wait("active", 1)
        second = live.chat([{"role": "user", "content": "second"}])
        third = live.chat([{"role": "user", "content": "third"}])
        refused = live.chat()
        assert refused.status == 503 and refused.headers["Retry-After"] == "5"
        assert "2 requests are waiting" in json.loads(refused.read())["error"]
        engine.allow(6)
        assert texts(first)[0] == [("text", "ab")]
        told = [[event["waiting"] for event in events(stream) if "waiting" in event] for stream in (second, third)]
        assert told == [[1, 0], [2, 1, 0]]
        asked = [TOKENIZER.decode(call["tokens"]) for call in engine.calls]
        assert "second" in asked[1] and "third" in asked[2]
        live.wait("active", 0)
        counts = live.get("/stats")
        assert (counts["requests"], counts["refused"], counts["waiting"], counts["active"]) == (3, 1, 0, 0)


def test_a_client_that_goes_costs_one_step_and_the_next_is_served() -> None:
    engine = FakeEngine(tokens_of("abcdefgh"), stepped=True)
    with serving(engine) as live:
        leaving = live.chat()
        engine.allow()
        next(events(leaving))
        live.leave(leaving)
        worker = live.server.config.app.state.worker  # type: ignore[union-attr]
        tiny.wait_until(lambda: worker.active.cancelled)
        engine.allow()  # the step that was running when it went
        assert engine.closed.acquire(timeout=SECONDS) and engine.taken == [2]
        engine.allow(8)
        assert texts(live.chat())[0] == [("text", "abcdefgh")]
        assert live.get("/stats")["cancelled"] == 1


def test_a_client_that_goes_while_it_waits_is_dropped() -> None:
    engine = FakeEngine(tokens_of("abc"), stepped=True)
    with serving(engine) as live:
        first = live.chat()
        live.wait("active", 1)
        live.leave(live.chat())
        live.wait("waiting", 0)
        engine.allow(3)
        assert texts(first)[0] == [("text", "abc")]
        assert len(engine.calls) == 1 and live.get("/stats")["cancelled"] == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("secret"), "the model failed (ValueError); the server's terminal says where"),
        (UserError("the context is full"), "the context is full"),
    ],
)
def test_an_error_in_the_middle_is_told_and_the_next_request_served(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """nanochat's stream just ended."""
    with serving(FakeEngine(tokens_of("ab"), error=error)) as live:
        for _ in range(2):
            *pieces, last = events(live.chat())
            assert [piece["token"] for piece in pieces] == ["a", "b"] and last == {"error": line}
        assert live.get("/stats")["failed"] == 2
    assert ("secret" in capsys.readouterr().err) == (type(error) is ValueError)


def test_the_end_of_the_server_ends_the_streams() -> None:
    engine = FakeEngine(tokens_of("abc" * 100), stepped=True)
    with serving(engine) as live:
        running = live.chat()
        live.wait("active", 1)
        waiting = live.chat()
        live.server.should_exit = True
        tiny.wait_until(lambda: live.server.config.app.state.worker.closed)  # type: ignore[union-attr]
        engine.allow()
        assert list(events(running))[-1]["finish_reason"] == "cancelled"
        assert list(events(waiting))[-1]["finish_reason"] == "cancelled"
    assert engine.taken == [1]


# -----------------------------------------------------------------------------
# What is refused


def conversation(count: int, size: int = 1) -> list[dict[str, Any]]:
    return pairs(*["x" * size] * count)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff{}", "not JSON"),
        ([1], "expected an object with messages"),
        ({}, "at least one"),
        ({"messages": []}, "at least one"),
        ({"messages": "x"}, "at least one"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "'bot'"),
        ({"messages": [{"role": "user", "content": 3}]}, "int"),
        ({"messages": conversation(2)}, "the last message is the assistant's"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "is empty"),
        ({"messages": conversation(501)}, "501 messages; at most 500"),
        ({"messages": conversation(1, 8_001)}, "8,001 characters; at most 8,000"),
        ({"messages": conversation(5, 6_401)}, "32,005 characters; at most 32,000"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "cannot encode"),
        ({"messages": HELLO, "temperature": 2.1}, "temperature=2.1: expected a number from 0 to 2"),
        ({"messages": HELLO, "temperature": float("nan")}, "temperature=nan"),
        ({"messages": HELLO, "temperature": True}, "temperature=True"),
        ({"messages": HELLO, "temperature": "1"}, "temperature='1'"),
        ({"messages": HELLO, "top_k": 201}, "top_k=201: expected a whole number from 0 to 200"),
        ({"messages": HELLO, "top_k": 1.5}, "top_k=1.5"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens=0: expected a whole number from 1 to 4,096"),
        ({"messages": HELLO, "max_tokens": 4097}, "max_tokens=4097"),
        ({"messages": HELLO, "seed": -1}, "seed=-1"),
        ({"messages": HELLO, "seed": 10**400}, "seed=1000"),
        ({"messages": HELLO, "tools\ud800": []}, "unknown field 'tools"),
    ],
)
def test_a_request_beyond_the_limits_is_refused_in_one_line(simple: Live, body: Any, line: str) -> None:
    response = simple.request("POST", "/chat/completions", body)
    error = json.loads(response.read())["error"]
    assert response.status == 400 and line in error and "\n" not in error and len(error) < 200


def test_the_limits_themselves_are_taken() -> None:
    with serving(FakeEngine(tokens_of("a")), context=50_000) as live:
        for messages in (conversation(499), conversation(1, 8_000), [*conversation(4, 7_000), *conversation(1, 4_000)]):
            assert texts(live.chat(messages, temperature=2, top_k=200, max_tokens=4096))[0] == [("text", "a")]


def test_a_large_body_is_refused_while_it_comes(simple: Live) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server need not read all of it
        response = simple.request("POST", "/chat/completions", b" " * (1 << 21))
        assert response.status == 413 and "1,048,576 bytes" in json.loads(response.read())["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),  # DNS rebinding: the browser keeps the name of the site it was on
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "10.0.0.1"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "LOCALHOST:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8001"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 415),  # which a form of another site could send
    ],
)
def test_pages_of_other_sites_are_refused(simple: Live, headers: dict[str, str], status: int) -> None:
    response = simple.request("POST", "/chat/completions", {"messages": HELLO}, **headers)
    response.read()
    assert response.status == status
    assert not [name for name in response.headers if name.lower().startswith("access-control-")]


def test_other_paths_and_methods_answer_with_one_line(simple: Live) -> None:
    for path, status in {"/docs": 404, "/openapi.json": 404, "/chat/completions": 405}.items():
        response = simple.request("GET", path)
        assert response.status == status and list(json.loads(response.read())) == ["error"]


def test_the_page_may_run_its_own_script_and_style_and_nothing_else(simple: Live) -> None:
    response = simple.request("GET", "/")
    page = response.read().decode()
    assert page == PAGE.read_text(encoding="utf-8")
    policy = dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))
    for tag in ("script", "style"):
        (block,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'" and response.headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\bstyle=|\son\w+=", page)
    assert re.findall(r"https?://[^'\"]*", page) == ["http://www.w3.org/2000/svg"]  # a name, never asked for


def test_names_that_may_be_asked_for() -> None:
    assert allowed_hosts("127.0.0.1") == {"localhost", "127.0.0.1", "::1"}
    assert "box.lan" in allowed_hosts("BOX.lan") and socket.gethostname().lower() in allowed_hosts("0.0.0.0")
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8")] == [True] * 4
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "box.lan")))


def test_on_all_addresses_any_address_may_be_asked_for_but_no_name() -> None:
    with serving(FakeEngine(tokens_of("a")), hosts=allowed_hosts("0.0.0.0")) as live:
        for host, status in (("10.1.2.3:8000", 200), ("[fe80::1]", 200), ("evil.example", 403)):
            response = live.request("GET", "/health", Host=host)
            response.read()
            assert response.status == status, host


# -----------------------------------------------------------------------------
# The command


def test_an_address_that_cannot_be_had_is_one_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port}: Address already in use; try another, such as --port="):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--host=300.1.1.1 "):
        listen("300.1.1.1", 8000)


@pytest.mark.parametrize(("name", "value"), [("num_gpus", 2), ("temperature", 3.0), ("top_k", -1), ("max_tokens", 0)])
def test_settings_beyond_the_limits_are_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    monkeypatch.setattr(chat_web, name, value)
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}={value}: expected"):
        chat_web.main()


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_an_address_that_others_reach_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str, warned: bool
) -> None:
    served: list[Callable[..., None]] = []

    def run(self: Server, sockets: list[socket.socket]) -> None:
        served.append(sockets[0].close)
        raise KeyboardInterrupt

    found = Checkpoint(Path("d1/step_000005"), {"step": 5})
    monkeypatch.setattr(chat_web, "find_checkpoint", lambda *_: found)
    monkeypatch.setattr(chat_web, "load_model", lambda *_: (small_model(SMALL), TOKENIZER, found.meta))
    monkeypatch.setattr(Server, "run", run)
    for name, value in {"host": host, "port": 0, "device_type": "cpu", "dtype": "float32"}.items():
        monkeypatch.setattr(chat_web, name, value)
    chat_web.main()
    served[0]()
    output = capsys.readouterr().out
    assert f"chat: http://{host}:" in output and ("anybody in the network" in output) == warned
