"""The web server over real sockets, with an engine that the test steps by hand."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from nanochat import access
from nanochat import server as server_module
from nanochat.access import Access, is_loopback
from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import UserError
from nanochat.conversation import render_for_completion, render_within
from nanochat.engine import Engine, Request, Said
from nanochat.gpt import GPTConfig
from nanochat.server import Defaults, Server, create_app, listen, make_server
from nanochat.serving import Serving
from nanochat.tokenizer import Tokenizer
from scripts import chat_web
from tests import test_gpt2, test_llama, tiny
from tests.test_gpt import small_model

TOKENIZER = Tokenizer(np.empty((0, 2)))  # one token per byte, so that characters are split over tokens
HELLO = [{"role": "user", "content": "Hello"}]
SMALL = GPTConfig(64, TOKENIZER.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
CALL = ("<|python_start|>", "12*3", "<|python_end|>", "<|output_start|>", "36", "<|output_end|>")
SECONDS = 30  # after which a test gives up


def tokens_of(*parts: str) -> list[int]:
    """Token ids of texts and of special tokens, given by name."""
    ids = [[TOKENIZER.encode_special(part)] if part.startswith("<|") else TOKENIZER.encode(part) for part in parts]
    return [token for row in ids for token in row]


def pairs(*contents: Any) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]


class FakeEngine:
    """Says `tokens` to everybody; with stepped=True a batch takes a step per allow()."""

    def __init__(self, tokens: list[int], stepped: bool = False, error: Exception | None = None):
        self.tokens, self.error = tokens, error
        self.gate = threading.Semaphore(0) if stepped else None
        self.stop_tokens = frozenset(tokens_of("<|assistant_end|>", "<|bos|>"))
        self.calls: list[dict[str, Any]] = []  # what the batches were asked
        self.taken: list[int] = []  # tokens that each request had when it left
        self.closed = threading.Semaphore(0)  # one release per request that left

    def allow(self, steps: int = 1) -> None:
        if self.gate:
            self.gate.release(steps)

    def batch(self, slots: int) -> "FakeBatch":
        return FakeBatch(self, slots)

    def score(self, tokens: list[int], top: int) -> list[tuple[float, list[tuple[int, float]]]]:
        """A token's id is its log-probability."""
        return [(-float(token), [(token, -float(token))][:top]) for token in tokens[1:]]


class FakeBatch:
    """A Batch of a FakeEngine."""

    def __init__(self, engine: FakeEngine, slots: int):
        self.engine, self.slots = engine, slots
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        if not request.prompt:
            raise UserError("the prompt has 0 tokens")
        assert len(self.running) < self.slots, "the line is the server's"
        self.engine.calls.append({"tokens": request.prompt, "stream": request.stream, **vars(request.sampling)})
        if request.sampling.max_tokens == 0:
            request.finished = "length"
        else:
            self.running.append(request)

    def cancel(self, request: Request) -> None:
        request.finished = request.finished or "cancelled"
        if request in self.running:
            self.leave(request)

    def leave(self, request: Request) -> None:
        self.running.remove(request)
        self.engine.taken.append(len(request.tokens))
        self.engine.closed.release()

    def step(self) -> list[Said]:
        if self.engine.gate:
            self.engine.gate.acquire()
        return [self.say(request) for request in list(self.running)]

    def say(self, request: Request) -> Said:
        if self.engine.error and len(request.tokens) == len(self.engine.tokens):
            raise self.engine.error
        token = self.engine.tokens[len(request.tokens)]
        request.tokens.append(token)
        at_end = len(request.tokens) == len(self.engine.tokens) and not self.engine.error
        if token in self.engine.stop_tokens:
            request.finished = "stop"
        elif at_end or len(request.tokens) == request.sampling.max_tokens:
            request.finished = "length"
        if request.finished:
            self.leave(request)
        top = request.sampling.logprobs
        return Said(request, token, 1, *((-0.5, [(token, -0.5)][:top]) if top is not None else ()))


class Live:
    """A running server and its clients."""

    def __init__(self, server: Server, serving: Serving, port: int, token: str | None):
        self.server, self.serving, self.port = server, serving, port
        self.token = token
        self.connections: list[http.client.HTTPConnection] = []

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        self.connections.append(connection)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        bearer = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        connection.request(method, path, data, {**kind, **bearer, **headers})
        return connection.getresponse()

    def chat(self, messages: Any = HELLO, **fields: Any) -> http.client.HTTPResponse:
        return self.request("POST", "/chat/completions", {"messages": messages, **fields})

    def complete(self, path: str, **fields: Any) -> Any:
        return json.loads(self.request("POST", f"/v1/{path}", fields).read())

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
    def client(self, **options: Any) -> Iterator[openai.OpenAI]:
        """The official client."""
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key=self.token or "-",
            max_retries=0,
            timeout=SECONDS,
            **options,
        ) as client:
            yield client


@contextlib.contextmanager
def serving(
    *engines: Any, context: int = 2048, slots: int = 8, max_waiting: int = 32, token: str | None = None, **options: Any
) -> Iterator[Live]:
    """create_app() on a free port."""
    listener = listen("127.0.0.1", 0)
    line = Serving(engines, slots, max_waiting)
    options.setdefault("access", Access(token=token))
    server = make_server(create_app(line, TOKENIZER, context, "fake", **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    live = Live(server, line, listener.getsockname()[1], token)
    try:
        yield live
    finally:
        server.handle_exit(15, None)
        server.handle_exit(15, None)  # the second signal: at once
        for engine in engines:
            if isinstance(engine, FakeEngine):
                engine.allow(10_000)
        thread.join(SECONDS)
        for connection in live.connections:
            connection.close()
        assert not thread.is_alive() and not any(worker.thread.is_alive() for worker in line.workers)


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
        if "token" not in piece:
            continue
        if joined and joined[-1][0] == piece["kind"]:
            joined[-1] = (piece["kind"], joined[-1][1] + piece["token"])
        else:
            joined.append((piece["kind"], piece["token"]))
    return joined, last


def said(response: http.client.HTTPResponse) -> str:
    return "".join(text for _, text in texts(response)[0])


# -----------------------------------------------------------------------------
# The page's replies


def test_tool_calls_and_split_characters_arrive_as_text_of_their_kind() -> None:
    """nanochat showed tool tokens as text, and U+FFFD where a character was split over tokens."""
    engine = FakeEngine(tokens_of("Größe 🎈: ", *CALL, " **it** is", "<|assistant_end|>"))
    with serving(engine) as live:
        pieces, last = texts(live.chat())
        assert pieces == [("text", "Größe 🎈: "), ("python", "12*3"), ("python_output", "36"), ("text", " **it** is")]
        prompt = render_for_completion(HELLO, TOKENIZER)
        assert engine.calls[0]["tokens"] == prompt
        assert last.pop("html").startswith("<p>Größe 🎈:")
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
        live.wait("active", 1)
        about = live.get("/health")
        assert about["ready"] and (about["status"], about["model"], about["context"]) == ("ok", "fake", 2048)
        assert about["limits"]["messages"] == 500 and about["defaults"]["top_k"] == 50


def test_settings_of_a_request_reach_the_engine_and_the_defaults_where_it_has_none() -> None:
    engine = FakeEngine(tokens_of("abc"))
    with serving(engine, defaults=Defaults(0.5, 7, 2)) as live:
        texts(live.chat())
        texts(live.chat())
        texts(live.chat(temperature=0, top_k=0, top_p=0.5, min_p=0.1, repetition_penalty=1.5, max_tokens=1, seed=-1))
    first, second, third = (
        {key: call[key] for key in call if key not in ("tokens", "stream")} for call in engine.calls
    )
    assert first.pop("seed") != second.pop("seed")  # else every chat would go the same way
    cuts = {"top_p": None, "min_p": None, "repetition_penalty": 1.0, "logprobs": None}
    assert first == second == {"temperature": 0.5, "top_k": 7, "max_tokens": 2, **cuts}
    cuts = {"top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5, "logprobs": None}
    assert third == {"temperature": 0, "top_k": 0, "max_tokens": 1, "seed": 2**64 - 1, **cuts}


def test_earlier_tool_use_is_rendered_as_in_training_and_text_never_becomes_a_special_token() -> None:
    """nanochat sent tool calls back as text, which the model had never seen in training."""
    parts = [{"type": "python", "text": "12*3"}, {"type": "python_output", "text": "36"}]
    messages = pairs("Hello", parts, "<|python_start|>1")
    engine = FakeEngine(tokens_of("a"))
    with serving(engine) as live:
        texts(live.chat(messages))
    tokens, call = engine.calls[0]["tokens"], tokens_of(*CALL)
    assert any(tokens[i : i + len(call)] == call for i in range(len(tokens)))
    assert tokens.count(TOKENIZER.encode_special("<|python_start|>")) == 1


def test_markdown_of_a_reply_and_of_the_page_is_rendered(simple: Live) -> None:
    html = json.loads(simple.request("POST", "/render", {"text": "# A <b>\n```python\nx = 1\n```"}).read())["html"]
    assert html.startswith("<h1>A &lt;b&gt;</h1>") and '<span class="o">=</span>' in html
    assert texts(simple.chat())[1]["html"] == "<p>Hi!</p>\n"


# -----------------------------------------------------------------------------
# OpenAI's API


def test_the_official_client_chats() -> None:
    engine = FakeEngine(tokens_of("It is ", *CALL, "36.", "<|assistant_end|>"))
    with serving(engine, token="a-secret-of-ours") as live, live.client() as client:
        assert [model.id for model in client.models.list()] == [client.models.retrieve("fake").id] == ["fake"]
        whole = client.chat.completions.create(model="fake", messages=HELLO, n=2, max_completion_tokens=99)
        assert [choice.message.content for choice in whole.choices] == ["It is 36."] * 2  # the tool's use stands beside
        assert whole.choices[0].message.nanochat["parts"][1] == {"type": "python", "text": "12*3"}
        assert whole.choices[0].finish_reason == "stop" and whole.object == "chat.completion"
        assert whole.usage.completion_tokens == 2 * len(engine.tokens)
        assert whole.usage.prompt_tokens == len(render_for_completion(HELLO, TOKENIZER))
        assert [call["stream"] for call in engine.calls] == [0, 1] and engine.calls[0]["seed"] == engine.calls[1][
            "seed"
        ]
        stream = client.chat.completions.create(
            model="nanochat", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "It is 36."
        assert last.choices == [] and last.usage.total_tokens == last.usage.prompt_tokens + len(engine.tokens)
        assert {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {(last.id, last.created, "fake")}


def test_the_stream_is_the_one_that_clients_expect() -> None:
    """The transcript of a stepped reply: role first, a reason with an empty delta last, then [DONE]."""
    engine = FakeEngine(tokens_of("é", *CALL, "<|assistant_end|>"), stepped=True)
    with serving(engine) as live:
        response = live.request("POST", "/v1/chat/completions", {"messages": HELLO, "stream": True})
        engine.allow(len(engine.tokens))
        lines = response.read().decode("ascii").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    head = {key: value for key, value in chunks[0].items() if key != "choices"}
    assert head["object"] == "chat.completion.chunk" and head["id"].startswith("chatcmpl-") and "usage" not in head
    assert all({**head, "choices": chunk["choices"]} == chunk for chunk in chunks)
    deltas: list[dict[str, Any]] = []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert choice["index"] == 0 and (choice["finish_reason"] is None) == (chunk is not chunks[-1])
        deltas.append(choice["delta"])
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {} and deltas[1] == {"content": "é"}
    used = [delta["nanochat"] for delta in deltas[2:-1]]
    assert "".join(use["text"] for use in used if use["kind"] == "python") == "12*3"
    assert "".join(use["text"] for use in used if use["kind"] == "python_output") == "36"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities() -> None:
    engine = FakeEngine(tokens_of("aé", "<|assistant_end|>"))
    with serving(engine) as live, live.client() as client:
        chat = client.chat.completions.create(model="fake", messages=HELLO, logprobs=True, top_logprobs=1)
        tokens = chat.choices[0].logprobs.content
        assert [token.token for token in tokens] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
        assert bytes(sum((token.bytes for token in tokens), [])).decode() == "aé"
        assert [token.logprob for token in tokens] == [-0.5] * 3 and tokens[0].top_logprobs[0].token == "a"
        chunks = list(client.chat.completions.create(model="fake", messages=HELLO, logprobs=True, stream=True))
        parts = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
        assert sum((len(part) for part in parts), 0) == 3
        text = client.completions.create(model="fake", prompt="xy", logprobs=1, echo=True, max_tokens=1).choices[0]
        assert text.text == "xya" and text.logprobs.tokens == ["x", "y", "a"]
        assert text.logprobs.token_logprobs == [-120.0, -121.0, -0.5] and text.logprobs.text_offset == [0, 1, 2]
        assert text.logprobs.top_logprobs == [{"x": -120.0}, {"y": -121.0}, {"a": -0.5}]


def test_completions_of_texts_and_of_tokens() -> None:
    """As lm-eval asks: token ids, echo, one log-probability, nothing to say."""
    engine = FakeEngine(tokens_of("abc"))
    with serving(engine) as live, live.client() as client:
        made = client.completions.create(model="fake", prompt=["x", "yz"], n=2, max_tokens=2, echo=True)
        assert [(choice.index, choice.text) for choice in made.choices] == list(
            enumerate(["xab", "xab", "yzab", "yzab"])
        )
        assert made.usage.prompt_tokens == 2 + 3 and made.usage.completion_tokens == 8
        assert [call["tokens"] for call in engine.calls[::2]] == [tokens_of("<|bos|>", "x"), tokens_of("<|bos|>", "yz")]
        scored = client.completions.create(
            model="fake", prompt=[tokens_of("ab"), tokens_of("c")], logprobs=1, echo=True, max_tokens=0, temperature=0
        )
        assert [choice.text for choice in scored.choices] == ["ab", "c"]
        assert scored.choices[0].logprobs.token_logprobs == [None, -98.0]
        assert engine.calls[-1]["tokens"] == tokens_of("c")
        chunks = list(client.completions.create(model="fake", prompt="x", stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "abc"
        assert chunks[-1].choices[0].finish_reason == "length" and chunks[0].object == "text_completion"


def test_a_stop_string_over_token_borders_is_never_shown() -> None:
    engine = FakeEngine(tokens_of("one STO two STOP three"), stepped=True)
    with serving(engine) as live:
        response = live.request(
            "POST", "/v1/completions", {"prompt": "x", "stop": ["STOP", "never"], "stream": True, "logprobs": 0}
        )
        engine.allow(len("one STO two STOP"))
        chunks = [json.loads(line[6:]) for line in response.read().decode().split("\n\n")[:-2]]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one STO two "
        told = [token for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
        assert "".join(told) == "one STO two " and chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert engine.taken == [len("one STO two STOP")]  # its slot is free


def test_neighbours_of_a_role_are_joined_and_system_messages_taken_as_clients_send_them() -> None:
    asked = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "One."},
        {"role": "user", "content": [{"type": "text", "text": "Two."}]},
        {"role": "assistant", "content": "Yes.", "tool_calls": None, "refusal": None, "name": "nano"},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Three."},
    ]
    engine = FakeEngine(tokens_of("a"))
    with serving(engine) as live:
        live.complete("chat/completions", messages=asked, user="me", tools=[], response_format={"type": "text"})
    system = {"role": "system", "content": "Be kind."}
    expected = [system, *pairs("One.\n\nTwo.", "Yes.", "Be brief.\n\nThree.")]
    assert engine.calls[0]["tokens"] == render_for_completion(expected, TOKENIZER)


def test_each_error_is_the_clients_own(simple: Live) -> None:
    with simple.client() as client:
        chat = client.chat.completions.create
        with pytest.raises(openai.BadRequestError, match="temperature.*less than or equal to 2") as bad:
            chat(model="fake", messages=HELLO, temperature=3)
        assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError, match="'tools' is not supported") as bad:
            chat(model="fake", messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}])
        assert bad.value.param == "tools" and bad.value.code == "unsupported_parameter"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here, but fake"):
            chat(model="gpt-4", messages=HELLO)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
        with pytest.raises(openai.BadRequestError, match="2,049 tokens; the context is 2,048") as bad:
            client.completions.create(model="fake", prompt="x" * 2048)
        assert bad.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="beyond 0 to"):
            client.completions.create(model="fake", prompt=[10**9])
        with pytest.raises(openai.BadRequestError, match="at most 32 texts"):
            client.completions.create(model="fake", prompt=["x", "y"], n=17)
    with simple.client() as client, pytest.raises(openai.PermissionDeniedError):
        client.with_options(default_headers={"Host": "evil.example"}).models.list()
    with serving(FakeEngine([]), token="a-secret-of-ours") as live, live.client() as client:
        other = client.with_options(api_key="another")
        with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer TOKEN"):
            other.models.list()


def test_a_failing_model_is_told_in_either_form() -> None:
    with serving(FakeEngine(tokens_of("ab"), error=UserError("no more"))) as live, live.client() as client:
        with pytest.raises(openai.BadRequestError, match="no more"):
            client.chat.completions.create(model="fake", messages=HELLO)
        with pytest.raises(openai.APIError, match="no more"):
            list(client.chat.completions.create(model="fake", messages=HELLO, stream=True))


@pytest.mark.parametrize(
    "config",
    [SMALL, *(replace(kind.SMALL, sequence_len=64, vocab_size=SMALL.vocab_size) for kind in (test_gpt2, test_llama))],
    ids=lambda config: type(config).__name__,
)
def test_a_small_real_model_answers_alike_alone_and_in_company(config: Any) -> None:
    """The same seed says the same whatever else is in the batch, streamed or not; a score is the engine's."""
    engine = Engine(small_model(config), TOKENIZER)
    with serving(engine, context=64, slots=4) as live, live.client() as client:

        def ask(seed: int) -> str:
            made = client.chat.completions.create(model="fake", messages=HELLO, seed=seed, max_tokens=8)
            return made.choices[0].message.content

        alone = [ask(seed) for seed in range(3)]
        together = [live.request("POST", "/v1/chat/completions", body) for body in (
            {"messages": HELLO, "seed": seed, "max_tokens": 8} for seed in range(3)
        )]  # fmt: skip
        assert alone == [json.loads(response.read())["choices"][0]["message"]["content"] for response in together]
        assert said(live.chat(seed=0, max_tokens=8)) == alone[0]
        prompt = tokens_of("<|bos|>", "hello")
        scored = live.complete("completions", prompt=prompt, echo=True, logprobs=2, max_tokens=0)["choices"][0]
        expected = [score for score, _ in engine.score(prompt)]
        assert scored["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)


# -----------------------------------------------------------------------------
# A model that has too little room


def test_what_does_not_fit_is_left_out_in_whole_turns_and_said() -> None:
    turn = pairs("u" * 20, "a" * 20)
    system = {"role": "system", "content": "Be kind."}
    messages = [system, *turn * 5, *HELLO]
    engine = FakeEngine(tokens_of("ok", "<|assistant_end|>"))
    with serving(engine, context=160) as live:
        first, *_, last = events(live.chat(messages))
        for stream in (False, True):
            response = live.request("POST", "/v1/chat/completions", {"messages": messages, "stream": stream})
            assert response.headers["X-Nanochat-Left-Out"] == "6" and response.read()
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
        assert response.status == 400 and "has 64 tokens" in json.loads(response.read())["error"]["message"]


# -----------------------------------------------------------------------------
# The line, and clients that go


def test_requests_take_turns_and_know_how_many_come_first() -> None:
    engine = FakeEngine(tokens_of("ab"), stepped=True)
    with serving(engine, slots=1, max_waiting=2) as live, live.client() as client:
        first = live.chat()
        live.wait("active", 1)
        second = live.chat([{"role": "user", "content": "second"}])
        third = live.chat([{"role": "user", "content": "third"}])
        with pytest.raises(openai.RateLimitError, match="2 requests wait already") as refused:
            client.chat.completions.create(model="fake", messages=HELLO)
        assert refused.value.response.headers["Retry-After"] == "5"
        stream = events(third)
        assert next(stream) == {"waiting": 2}
        engine.allow(2)
        assert said(first) == "ab" and next(stream) == {"waiting": 1}
        engine.allow(4)
        assert [event["waiting"] for event in events(second) if "waiting" in event] == [1, 0]
        assert next(stream) == {"waiting": 0} and list(stream)[-1]["done"]
        asked = [TOKENIZER.decode(call["tokens"]) for call in engine.calls]
        assert "second" in asked[1] and "third" in asked[2]
        live.wait("active", 0)
        counts = live.get("/stats")
        assert (counts["requests"], counts["refused"], counts["waiting"], counts["active"]) == (3, 1, 0, 0)


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_costs_one_step_and_the_next_is_served(path: str, stream: bool) -> None:
    """Also one that waits for the whole answer: polling is_disconnected() does not see it."""
    engine = FakeEngine(tokens_of("abcdefgh"), stepped=True)
    with serving(engine, slots=1) as live:
        body = {"stream": stream, **({"prompt": "x"} if path == "/v1/completions" else {"messages": HELLO})}
        if path == "/chat/completions":
            del body["stream"]
        leaving = socket.create_connection(("127.0.0.1", live.port), SECONDS)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        leaving.sendall(f"{head}{len(data)}\r\n\r\n".encode() + data)
        live.wait("active", 1)
        engine.allow()
        live.wait("tokens", 1)
        waiting = live.chat()
        live.wait("waiting", 1)
        leaving.close()
        (reply,) = live.serving.workers[0].running.values()
        tiny.wait_until(lambda: reply.cancelled)
        engine.allow()  # the step that was running when it went
        assert engine.closed.acquire(timeout=SECONDS) and engine.taken == [2]
        engine.allow(8)
        assert said(waiting) == "abcdefgh" and live.get("/stats")["cancelled"] == 1


def test_a_client_that_goes_while_it_waits_is_dropped() -> None:
    engine = FakeEngine(tokens_of("abc"), stepped=True)
    with serving(engine, slots=1) as live:
        first = live.chat()
        live.wait("active", 1)
        live.leave(live.chat())
        live.wait("waiting", 0)
        engine.allow(3)
        assert said(first) == "abc"
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
            pieces, last = texts(live.chat())
            assert pieces == [("text", "ab")] and last == {"error": line}
        assert live.get("/stats")["failed"] == 2
    assert ("secret" in capsys.readouterr().err) == (type(error) is ValueError)


def test_the_end_of_the_server_lets_running_replies_end_and_takes_no_new_ones() -> None:
    engine = FakeEngine(tokens_of("abc"), stepped=True)
    with serving(engine) as live:
        running = live.chat()
        live.wait("active", 1)
        kept = http.client.HTTPConnection("127.0.0.1", live.port, timeout=SECONDS)
        live.connections.append(kept)
        kept.request("GET", "/health")
        assert json.loads(kept.getresponse().read())["ready"]
        live.server.handle_exit(15, None)
        tiny.wait_until(lambda: live.serving.ending)
        kept.request("GET", "/health")
        assert not json.loads(kept.getresponse().read())["ready"]
        kept.request("POST", "/chat/completions", json.dumps({"messages": HELLO}), {"Content-Type": "application/json"})
        response = kept.getresponse()
        assert response.status == 503 and "the server ends" in response.read().decode()
        engine.allow(3)
        assert said(running) == "abc"


def test_a_second_signal_ends_the_streams_at_once() -> None:
    engine = FakeEngine(tokens_of("abc" * 100), stepped=True)
    with serving(engine, slots=1) as live:
        running, body = live.chat(), {"messages": HELLO, "stream": True}
        live.wait("active", 1)
        waiting = live.request("POST", "/v1/chat/completions", body)
        live.server.handle_exit(2, None)
        live.server.handle_exit(2, None)
        tiny.wait_until(lambda: live.serving.closed)
        engine.allow()
        assert list(events(running))[-1]["finish_reason"] == "cancelled"
        assert "the server ends" in waiting.read().decode()
    assert engine.taken == [1]


def test_several_engines_share_the_line_the_one_that_runs_least_takes_the_next() -> None:
    engines = [FakeEngine(tokens_of("ab"), stepped=True) for _ in range(2)]
    with serving(*engines, slots=2) as live:
        streams = []
        for active in (1, 2):
            streams.append(live.chat())
            live.wait("active", active)
        assert [len(worker.running) for worker in live.serving.workers] == [1, 1]
        for engine in engines:
            engine.allow(2)
        gpus = [{event["gpu"] for event in events(stream) if "gpu" in event} for stream in streams]
        assert sorted(map(sorted, gpus)) == [[0], [1]]


# -----------------------------------------------------------------------------
# What is refused


def conversation(count: int, size: int = 1) -> list[dict[str, Any]]:
    return pairs(*["x" * size] * count)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"{", "Expecting property name"),
        (b"[" * 100_000, "parsing the body"),
        (b"\xff{}", "parsing the body"),
        ([1], "valid dictionary"),
        ({}, "messages: Field required"),
        ({"messages": []}, "at least 1 item"),
        ({"messages": "x"}, "messages: Input should be a valid list (given 'x')"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "(given 'bot')"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "'tool_calls' is not supported"),
        ({"messages": conversation(2)}, "the last message is the assistant's"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "is empty"),
        ({"messages": conversation(501)}, "501 messages; at most 500"),
        ({"messages": conversation(1, 8_001)}, "8,001 characters; at most 8,000"),
        ({"messages": conversation(5, 6_401)}, "32,005 characters; at most 32,000"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"messages": HELLO, "temperature": 2.1}, "less than or equal to 2 (given 2.1)"),
        ({"messages": HELLO, "temperature": float("nan")}, "finite number (given nan)"),
        ({"messages": HELLO, "temperature": 10**400}, "temperature"),
        ({"messages": HELLO, "temperature": True}, "temperature: Input should be a valid number (given True)"),
        ({"messages": HELLO, "temperature": "1"}, "(given '1')"),
        ({"messages": HELLO, "top_k": 201}, "less than or equal to 200 (given 201)"),
        ({"messages": HELLO, "top_k": 1.5}, "top_k: Input should be a valid integer"),
        ({"messages": HELLO, "top_p": 0}, "greater than 0"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"messages": HELLO, "max_tokens": 4097}, "less than or equal to 4096"),
        ({"messages": HELLO, "max_tokens": True}, "max_tokens"),
        ({"messages": HELLO, "seed": 10**400}, "seed: "),
        ({"messages": HELLO, "stop": ["a"] * 17}, "at most 16 items"),
        ({"messages": HELLO, "stop": ""}, "at least 1 character"),
        ({"messages": HELLO, "logit_bias": {"5": 100}}, "'logit_bias' is not supported here"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "'response_format' is not supported here"),
        ({"messages": HELLO, "tools\ud800": [1]}, "unable to parse"),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "x": ' + b"[" * 500 + b"1" + b"]" * 500 + b"}",
            "'x' is not",
        ),
    ],
)
@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
def test_a_request_beyond_the_limits_is_refused_in_one_line(simple: Live, body: Any, line: str, path: str) -> None:
    response = simple.request("POST", path, body)
    error = json.loads(response.read())["error"]
    assert response.status == 400, error
    assert error["type"] == "invalid_request_error" and error.keys() == {"message", "type", "param", "code"}
    message = error["message"]
    assert line in message and "\n" not in message and len(message) < 250, message


def test_the_limits_themselves_are_taken() -> None:
    with serving(FakeEngine(tokens_of("a")), context=50_000) as live:
        for messages in (conversation(499), conversation(1, 8_000), [*conversation(4, 7_000), *conversation(1, 4_000)]):
            assert said(live.chat(messages, temperature=2, top_k=200, max_tokens=4096, seed=2**63 - 1)) == "a"


def test_a_large_body_is_refused_while_it_comes(simple: Live) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server need not read all of it
        response = simple.request("POST", "/chat/completions", b" " * (1 << 21))
        assert response.status == 413 and json.loads(response.read())["error"]["message"].endswith("1,048,576 bytes")


def test_a_large_header_is_refused(simple: Live) -> None:
    assert simple.request("GET", "/health", Cookie="x" * 17_000).status == 431
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        assert simple.request("GET", "/health", Cookie="x" * 1_000_000).status in (400, 431)


def test_clients_that_drip_or_do_not_read_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.2)
    with serving(FakeEngine(tokens_of("a" * 100))) as live:
        head = b"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", live.port), SECONDS) as header, contextlib.suppress(OSError):
            header.sendall(head)
            assert header.recv(100) == b""
        with socket.create_connection(("127.0.0.1", live.port), SECONDS) as body:
            body.sendall(head + b"Content-Length: 100\r\n\r\n{")
            assert b" 408 " in body.recv(100)


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
        ({"Origin": "https://chat.example"}, 403),
        ({"Host": "chat.example", "Origin": "https://chat.example"}, 403),
        ({"Content-Type": "text/plain"}, 415),  # which a form of another site could send
    ],
)
def test_pages_of_other_sites_are_refused(simple: Live, headers: dict[str, str], status: int) -> None:
    response = simple.request("POST", "/chat/completions", {"messages": HELLO}, **headers)
    content = response.read()
    assert response.status == status
    assert not [name for name in response.headers if name.lower().startswith("access-control-")]
    assert status == 200 or json.loads(content)["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "chat.example", "Origin": "https://chat.example"}, 200),
        ({"Host": "chat.example", "Origin": "https://evil.example"}, 403),
        ({"Origin": "https://CHAT.example"}, 200),  # a proxy that rewrites Host
        ({"Host": "localhost:8000", "Origin": "https://other.example"}, 200),
        ({"Host": "evil.example", "Origin": "https://chat.example"}, 403),
    ],
)
def test_a_proxy_or_tunnel_is_served_when_it_is_named(headers: dict[str, str], status: int) -> None:
    """Both ways ended in 403, with advice that could not work."""
    access = Access(public=frozenset({"chat.example", "other.example"}))
    with serving(FakeEngine(tokens_of("a")), access=access) as live:
        response = live.request("POST", "/chat/completions", {"messages": HELLO}, **headers)
        assert response.status == status and response.read()
        refused = live.request("POST", "/chat/completions", {"messages": HELLO}, Origin="https://new.example:8")
        assert "--public-host=new.example" in refused.read().decode()


def test_a_prefix_may_be_left_on_or_taken_off_by_the_proxy() -> None:
    with serving(FakeEngine(tokens_of("a")), root_path="/chat", token="a-secret-of-ours") as live:
        for path in ("/v1/models", "/chat/v1/models", "/chat/", "/"):
            assert live.request("GET", path).status == 200, path
        assert live.request("GET", "/chat", Authorization="").headers["Location"] == "/chat/"
        assert live.request("GET", "/chat/v1/models", Authorization="").status == 401


def test_every_route_but_the_pages_own_files_needs_the_token() -> None:
    with serving(FakeEngine(tokens_of("a")), token="a-secret-of-ours") as live:
        schema = live.get("/openapi.json")["paths"]
        paths = {path.replace("{name}", "fake") for path in schema} | {"/docs", "/openapi.json", "/nowhere"}
        assert len(paths) >= 10
        wrong = ["", "Bearer", "Bearer x", "Basic a-secret-of-ours", "a-secret-of-ours", "Bearer a-secret-of-our\xe9"]
        for path in sorted(paths):
            for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"):
                for header in wrong if path != "/health" else []:
                    response = live.request(method, path, {} if method == "POST" else None, Authorization=header)
                    assert response.status == 401 and response.headers["WWW-Authenticate"] == "Bearer", (path, method)
                    response.read()
        for path in ("/", "/static/chat.js", "/health"):
            assert live.request("GET", path, Authorization="").status == 200
        for path in ("/static/../v1/models", "/static/..%2f..%2fserver.py", "//v1/models"):
            assert live.request("GET", path, Authorization="").status in (401, 404), path
        assert live.request("GET", "/stats", Authorization="bearer a-secret-of-ours").status == 200


def test_head_and_options_are_answered_as_a_web_server_does(simple: Live) -> None:
    for path in ("/", "/static/style.css", "/health", "/v1/models", "/metrics", "/docs", "/runs"):
        head = simple.request("HEAD", path)
        assert head.status == 200 and head.read() == b"" and int(head.headers["Content-Length"]) > 20, path
        options = simple.request("OPTIONS", path)
        assert options.status == 204 and options.headers["Allow"] == "GET, HEAD, OPTIONS", path
    assert simple.request("OPTIONS", "/v1/chat/completions").headers["Allow"] == "OPTIONS, POST"
    assert simple.request("OPTIONS", "/nowhere").status == 404


def test_other_paths_and_methods_answer_with_one_line(simple: Live) -> None:
    for path, status in {"/nowhere": 404, "/chat/completions": 405, "/static/nothing.js": 404}.items():
        response = simple.request("GET", path)
        assert response.status == status and json.loads(response.read())["error"]["message"]
    assert simple.request("GET", "/chat/completions").headers["Allow"] == "POST"


def test_the_page_may_run_its_own_script_and_style_and_nothing_else(simple: Live) -> None:
    for path in ("/", "/static/chat.js", "/health", "/nowhere"):
        headers = simple.request("GET", path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert (
            policy["default-src"]
            == policy["frame-ancestors"]
            == policy["form-action"]
            == policy["base-uri"]
            == "'none'"
        )
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
        assert headers["Cache-Control"] == ("no-cache" if path in ("/", "/static/chat.js") else "no-store")
    cached = simple.request(
        "GET", "/static/chat.js", **{"If-None-Match": simple.request("HEAD", "/static/chat.js").headers["ETag"]}
    )
    assert cached.status == 304


def test_figures_for_prometheus_and_the_list_of_routes(simple: Live) -> None:
    said(simple.chat())
    figures = simple.request("GET", "/metrics").read().decode()
    assert "nanochat_tokens_total" in figures and "process_resident_memory_bytes" in figures
    docs = simple.request("GET", "/docs").read().decode()
    assert "/v1/chat/completions" in docs and "//" not in docs  # nothing from elsewhere


def test_names_that_may_be_asked_for() -> None:
    assert Access().hosts == {"localhost", "127.0.0.1", "::1"}
    assert "box.lan" in Access("BOX.lan").hosts and socket.gethostname().lower() in Access("0.0.0.0").hosts
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8")] == [True] * 4
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "box.lan")))


def test_on_all_addresses_any_address_may_be_asked_for_but_no_name() -> None:
    with serving(FakeEngine(tokens_of("a")), access=Access("0.0.0.0")) as live:
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 3.0),
        ("top_k", 201),
        ("max_tokens", 5000),
        ("public_host", "https://chat.example"),
        ("token", "short"),
        ("token", "not a token"),
    ],
)
def test_settings_beyond_the_limits_are_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    monkeypatch.setattr(chat_web, name, value)
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        chat_web.main()


@pytest.mark.parametrize(
    ("settings", "token"),
    [
        ({}, None),
        ({"host": "0.0.0.0"}, "made up"),
        ({"public_host": "a.example,b.example"}, "made up"),
        ({"token": "given-by-user"}, "given-by-user"),
        ({"host": "0.0.0.0", "environment": "of-the-environment"}, "of-the-environment"),
    ],
)
def test_a_token_is_needed_where_others_can_reach_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: dict[str, str], token: str | None
) -> None:
    served: list[Callable[..., None]] = []

    def run(self: Server, sockets: list[socket.socket]) -> None:
        served.append(sockets[0].close)
        self.config.app.state.service.serving.close()  # type: ignore[union-attr]

    monkeypatch.delenv("NANOCHAT_TOKEN", raising=False)
    if environment := settings.pop("environment", None):
        monkeypatch.setenv("NANOCHAT_TOKEN", environment)
    found = Checkpoint(Path("d1/step_000005"), {"step": 5})
    monkeypatch.setattr(chat_web, "find_checkpoint", lambda *_: found)
    monkeypatch.setattr(chat_web, "load_model", lambda *_: (small_model(SMALL), TOKENIZER, found.meta))
    monkeypatch.setattr(Server, "run", run)
    compiled: list[list[int]] = []
    monkeypatch.setattr(chat_web, "compile_decoding", lambda engine, rows: compiled.append(rows))
    for name, value in {"port": 0, "device_type": "cpu", "dtype": "float32", **settings}.items():
        monkeypatch.setattr(chat_web, name, value)
    chat_web.main()
    served[0]()
    assert compiled == [[1, 8, 32]]
    output = capsys.readouterr().out
    assert f"chat: http://{settings.get('host', '127.0.0.1')}:" in output
    assert ("#token=" in output) == (token == "made up")  # one that was given is no news, and logs are kept
    assert token in (None, "made up") or token not in output
    assert ("https://a.example/#token=" in output) == ("public_host" in settings)


def test_more_gpus_than_there_are_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Checkpoint(Path("d1/step_000005"), {"step": 5})
    monkeypatch.setattr(chat_web, "find_checkpoint", lambda *_: found)
    for name, value in {"num_gpus": 2, "device_type": "cpu"}.items():
        monkeypatch.setattr(chat_web, name, value)
    with pytest.raises(UserError, match="--num-gpus=2: expected 1 at most"):
        chat_web.open_engines()
