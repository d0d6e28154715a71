"""The web chat: a page, and replies streamed as server-sent events.

    GET  /                  the page, ui.html
    GET  /health            {"status": "ok", "ready": true, "model": ..., "context": ..., "limits": {...}}
    GET  /stats             requests, active, waiting, tokens, tokens per second, uptime
    POST /chat/completions  {"messages": [...], "temperature", "max_tokens", "top_k", "seed"} -> events

    data: {"waiting": 2}                                     requests that come first; 0 when it is this one's turn
    data: {"left_out": 4}                                    oldest messages that the context has no room for
    data: {"token": "Hi", "kind": "text", "gpu": 0}          kinds as in conversation.py
    data: {"done": true, "finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 3, "left_out": 0}
    data: {"error": "..."}                                   instead of done

Promises: the model runs in a thread of its own, so the page answers at any time; requests take turns, first come first
served; a client that is gone costs one step at most. A stream ends in done or error, never in silence. No conversation
is stored or logged, and no other site's page can reach this one. It does not authenticate: it is for this machine or a
network you trust.
"""

import asyncio
import base64
import contextlib
import hashlib
import ipaddress
import json
import secrets
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.common import UserError
from nanochat.conversation import Piece, StreamDecoder, check_messages, render_within
from nanochat.engine import Engine, Sampling
from nanochat.tokenizer import Tokenizer

Event = dict[str, Any]

LIMITS = {"messages": 500, "message_characters": 8_000, "characters": 32_000}
RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 2),
    "top_k": (int, 0, 200),
    "max_tokens": (int, 1, 4_096),
    "seed": (int, 0, 2**32 - 1),
}
MAX_BODY_BYTES = 1 << 20  # 32,000 characters, each as a \u escape pair of 12 bytes, are a third of it
BODY_SECONDS = 30  # to send the body in; a client that drips bytes must not hold a connection for ever
MAX_WAITING = 32  # requests in line behind the running one
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
PAGE = Path(__file__).with_name("ui.html")


@dataclass(frozen=True)
class Defaults:
    """What a request that doesn't say otherwise gets."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_range(name, value, f"--{name.replace('_', '-')}={value}")


# -----------------------------------------------------------------------------
# The model's thread


class Job:
    """One reply: what it continues, how it is drawn, and the way back to the event loop that waits for it."""

    def __init__(self, tokens: list[int], sampling: Sampling, left_out: int = 0):
        self.tokens, self.sampling, self.left_out = tokens, sampling, left_out
        self.cancelled = False
        self.ahead = 0  # requests that come first, as last told
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        if left_out:
            self.tell(left_out=left_out)

    def tell(self, **event: Any) -> None:
        """Hand an event to the client; from any thread. Does nothing once its event loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def tell_piece(self, piece: Piece | None) -> None:
        if piece:
            self.tell(token=piece.text, kind=piece.kind, gpu=0)

    def tell_ahead(self, ahead: int) -> None:
        if ahead != self.ahead:
            self.ahead = ahead
            self.tell(waiting=ahead)

    def finish(self, reason: str, completion_tokens: int) -> None:
        """The last event. completion_tokens are what max_tokens counts: tool output and end token included."""
        count = {"prompt_tokens": len(self.tokens), "completion_tokens": completion_tokens}
        self.tell(done=True, finish_reason=reason, **count, left_out=self.left_out)


class Worker:
    """The thread that runs the engine until close(), and the line before it. Everything else is on the event loop."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, max_waiting: int):
        self.engine, self.tokenizer, self.max_waiting = engine, tokenizer, max_waiting
        self.line: deque[Job] = deque()
        self.active: Job | None = None
        self.closed = False
        self.changed = threading.Condition()  # held to look at or change line, active and closed
        self.started, self.seconds = time.monotonic(), 0.0
        self.counts = dict.fromkeys(("requests", "refused", "cancelled", "failed", "tokens"), 0)
        self.thread = threading.Thread(target=self.run, name="model", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Put a job in the line. Raises a 503 when the line is full or the server ends."""
        with self.changed:
            if self.closed or len(self.line) >= self.max_waiting:
                self.counts["refused"] += 1
                why = "the server ends" if self.closed else f"{len(self.line)} requests are waiting already"
                raise HTTPException(503, f"{why}; try again in a few seconds", {"Retry-After": "5"})
            self.counts["requests"] += 1
            self.line.append(job)
            self.tell_places()
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Take a job out of the line, or end it after the step that is running. No effect on a finished one."""
        with self.changed:
            job.cancelled = True
            if job in self.line:
                self.line.remove(job)
                self.counts["cancelled"] += 1
                job.finish("cancelled", 0)
                self.tell_places()

    def close(self) -> None:
        """Cancel everything and wait for the thread, which ends after the step that is running."""
        with self.changed:
            self.closed = True
            for job in filter(None, [*self.line, self.active]):
                self.cancel(job)
            self.changed.notify()
        self.thread.join(timeout=10)

    def stats(self) -> dict[str, float]:
        """What /stats says. Tokens per second are those of the time in which there was something to do."""
        with self.changed:
            now = {"active": int(self.active is not None), "waiting": len(self.line)}
        rate = self.counts["tokens"] / self.seconds if self.seconds else 0.0
        uptime = time.monotonic() - self.started
        return {**self.counts, **now, "tokens_per_second": round(rate, 1), "uptime_seconds": round(uptime, 1)}

    def tell_places(self) -> None:
        """Tell those in the line how many come first. Called with the lock held."""
        for place, job in enumerate(self.line):
            job.tell_ahead(place + (self.active is not None))

    def run(self) -> None:
        """The thread: one job after the other until close()."""
        while True:
            with self.changed:
                self.active = None
                self.changed.wait_for(lambda: self.line or self.closed)
                if self.closed:
                    return
                job = self.active = self.line.popleft()
                job.tell_ahead(0)
                self.tell_places()
            try:
                self.reply(job)
            except Exception as error:  # whatever one request does, the next one is served
                self.counts["failed"] += 1
                if not isinstance(error, UserError):
                    traceback.print_exc()
                    error = RuntimeError(f"the model failed ({type(error).__name__}); the server's terminal says where")
                job.tell(error=str(error))

    def reply(self, job: Job) -> None:
        """Generate one reply, piece by piece. The engine's generator is closed however this ends."""
        decoder, reason, count = StreamDecoder(self.tokenizer), "length", 0
        clock = time.monotonic()
        with contextlib.closing(self.engine.generate(job.tokens, job.sampling)) as tokens:
            while not job.cancelled and (token := next(tokens, None)) is not None:
                count += 1
                self.counts["tokens"] += 1
                self.seconds, clock = self.seconds + time.monotonic() - clock, time.monotonic()
                if token in self.engine.stop_tokens:
                    reason = "stop"
                    break
                job.tell_piece(decoder.feed(token))
        job.tell_piece(decoder.finish())
        if job.cancelled and reason != "stop":
            reason = "cancelled"
            self.counts["cancelled"] += 1
        job.finish(reason, count)


# -----------------------------------------------------------------------------
# What a request may ask


def check_range(name: str, value: object, given: str) -> None:
    """Raise UserError unless `value` is a number of the setting's kind and range."""
    kind, low, high = RANGES[name]
    if type(value) not in (int, kind) or not low <= cast(float, value) <= high:  # a NaN is in no range
        number = "a whole number" if kind is int else "a number"
        raise UserError(f"{given}: expected {number} from {low:,} to {high:,}")


def parse_request(body: bytes, defaults: Defaults) -> tuple[list[dict[str, Any]], Sampling]:
    """(messages, sampling) of a request's body; without a seed it gets a random one. UserError beyond the limits."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON ({shorten(str(error))})") from None
    if not isinstance(content, dict):
        raise UserError(f"the body is {shorten(content)}; expected an object with messages")
    if unknown := sorted(content.keys() - {"messages", *RANGES}):
        raise UserError(f"unknown field {shorten(unknown[0])}; there are messages, {', '.join(RANGES)}")
    messages = content.pop("messages", None)
    given = {name: value for name, value in content.items() if value is not None}
    for name, value in given.items():
        check_range(name, value, f"{name}={shorten(value)}")
    check_messages(messages)
    check_sizes(messages)
    return messages, Sampling(**{**vars(defaults), "seed": secrets.randbits(32), **given})


def check_sizes(messages: list[dict[str, Any]]) -> None:
    """Raise UserError for messages beyond LIMITS, and when the last one is not the user's or empty."""
    if len(messages) > LIMITS["messages"]:
        raise UserError(f"{len(messages):,} messages; at most {LIMITS['messages']:,} are taken")
    if messages[-1]["role"] != "user":
        raise UserError(f"the last message is the {messages[-1]['role']}'s; expected the user's")
    sizes = [count_characters(message["content"]) for message in messages]
    for number, size in enumerate(sizes, 1):
        if size > LIMITS["message_characters"]:
            raise UserError(f"message {number} has {size:,} characters; at most {LIMITS['message_characters']:,} each")
    if sum(sizes) > LIMITS["characters"]:
        raise UserError(f"the messages have {sum(sizes):,} characters; at most {LIMITS['characters']:,} in all")
    if not messages[-1]["content"].strip():
        raise UserError("the last message is empty; expected something to reply to")


def count_characters(content: str | list[dict[str, str]]) -> int:
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


def shorten(value: object) -> str:
    """A value as an error line shows it: printable ASCII, 60 characters at most."""
    text = ascii(value) if not isinstance(value, str) else ascii(value[:80])
    return text if len(text) <= 60 else text[:57] + "..."


# -----------------------------------------------------------------------------
# HTTP


def reply_to(worker: Worker, job: Job) -> StreamingResponse:
    """A job's events as an HTTP response; the job ends when the client goes, also while it waits."""

    async def events() -> AsyncIterator[str]:
        event: Event = {}
        while not event.keys() & {"done", "error"}:
            event = await job.events.get()
            yield f"data: {json.dumps(event)}\n\n"

    worker.submit(job)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second: nginx is not to collect it
    end = BackgroundTask(worker.cancel, job)  # unlike a `finally` in events() it runs too if they never began
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers, background=end)


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """ASCII JSON: text from a request may hold what UTF-8 can't, a lone surrogate."""
    return Response(json.dumps(content) + "\n", status, headers, "application/json")


async def read_body(request: Request) -> bytes:
    """A request's JSON body. Raises 415 for other kinds, 413 when it is too large, 408 when it takes too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which another site's page can't send without asking first
        raise HTTPException(415, f"Content-Type {shorten(kind)}; expected application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body took longer than {BODY_SECONDS} seconds") from None
    return bytes(body)


def content_policy(page: str) -> str:
    """The Content-Security-Policy that runs the page's own script and style, named by hash, and nothing else."""

    def hash_of(tag: str) -> str:
        block = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{hash_of('script')}'; style-src 'sha256-{hash_of('style')}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def allowed_hosts(host: str) -> frozenset[str]:
    """Names that a request's Host header may have when `host` is listened on."""
    return LOOPBACK | {host.lower(), *([socket.gethostname().lower()] if is_any_address(host) else [])}


def parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


def is_any_address(host: str) -> bool:
    address = parse_address(host)
    return address is not None and address.is_unspecified


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    address = parse_address(host)
    return address.is_loopback if address else host.lower() == "localhost"


def refusal(headers: Headers, method: str, hosts: frozenset[str]) -> str | None:
    """Why a request is not answered: it came under a name that is not ours, as DNS rebinding does, or from another
    site's page. Where all addresses are listened on, an address is as good as a name: rebinding needs a name.
    """
    given, name = headers.get("host", ""), ""
    with contextlib.suppress(ValueError):
        name = urlsplit(f"//{given}").hostname or ""
    if name not in hosts and not (parse_address(name) and any(map(is_any_address, hosts))):
        return f"Host {shorten(given)} is not served here; start with --host=NAME to serve it"
    origin = headers.get("origin")
    if method not in ("GET", "HEAD") and origin is not None and origin.partition("://")[2] != given:
        return f"Origin {shorten(origin)} is another site; only the page served here may ask"
    return None


def guard(app: ASGIApp, hosts: frozenset[str], policy: str) -> ASGIApp:
    """`app`, which serves HTTP alone, with refusal() before it and the security headers on everything it answers."""
    extra = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
    }

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(extra)
            await send(message)

        problem = refusal(Headers(scope=scope), scope["method"], hosts)
        answer = json_response({"error": problem}, 403) if problem else app
        await answer(scope, receive, send_with_headers)

    return guarded


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    context: int,
    model: str = "",
    defaults: Defaults | None = None,
    hosts: frozenset[str] = LOOPBACK,
    max_waiting: int = MAX_WAITING,
) -> FastAPI:
    """The application: `context` is the model's sequence length in tokens, `model` the name that the page shows,
    `hosts` the names it may be reached by. Its worker, app.state.worker, runs until it is closed.
    """
    page = PAGE.read_text(encoding="utf-8")
    app = FastAPI(openapi_url=None)  # its pages for the schema load scripts from elsewhere
    worker = app.state.worker = Worker(engine, tokenizer, max_waiting)
    app.add_middleware(guard, hosts=hosts, policy=content_policy(page))

    @app.get("/")
    async def root() -> Response:
        return HTMLResponse(page, headers={"Cache-Control": "no-cache"})

    @app.get("/health")
    async def health() -> Response:
        ready = worker.thread.is_alive() and not worker.closed
        return json_response({"status": "ok", "ready": ready, "model": model, "context": context, "limits": LIMITS})

    @app.get("/stats")
    async def stats() -> Response:
        return json_response(worker.stats())

    @app.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        messages, sampling = parse_request(await read_body(request), defaults or Defaults())
        room = context - min(sampling.max_tokens or context, context // 4)  # the rest is kept for the reply
        tokens, left_out = await asyncio.to_thread(render_within, messages, tokenizer, room)
        return reply_to(worker, Job(tokens, sampling, left_out))

    @app.exception_handler(UserError)
    async def bad_request(request: Request, error: UserError) -> Response:
        return json_response({"error": str(error)}, 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return json_response({"error": error.detail}, error.status_code, error.headers)

    return app


# -----------------------------------------------------------------------------
# The process


class Server(uvicorn.Server):
    """uvicorn, which waits for open streams when it ends: so they are ended first."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.worker.close()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def make_server(app: FastAPI) -> Server:
    """A server for create_app()'s application; server.run(sockets=[listen(...)]) serves until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="warning", server_header=False)
    config.timeout_graceful_shutdown = 5
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UserError when the address can't be had."""
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[4][:2], family=address[0])
    except (OSError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        given, other = f"--host={host} --port={port}", f"--port={port % 65_535 + 1}"
        raise UserError(f"{given}: {reason}; try another, such as {other}") from None
