"""The web server: nanochat's page, and an API that OpenAI's clients speak.

    GET  /                      the page; its files are under /static
    GET  /health                {"status": "ok", "ready": true, "model", "context", "limits", "defaults"}
    POST /v1/chat/completions   and /v1/completions, GET /v1/models: as OpenAI's (api.py)
    GET  /stats /metrics        requests, active, waiting, tokens, ... as JSON, and for Prometheus
    GET  /docs /openapi.json    what there is
    POST /render                {"text"} -> {"html"}, of Markdown
    GET  /runs /report          the records of this base directory (runs.py)
    POST /chat/completions      what the page asks: {"messages": [...], "temperature", "max_tokens", ...} -> events

    data: {"waiting": 2}                                     replies that must end first; 0 when its turn has come
    data: {"left_out": 4}                                    oldest messages that the context has no room for
    data: {"token": "Hi", "kind": "text", "gpu": 0}          some characters; kinds as in conversation.py
    data: {"done": true, "finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 3, "left_out": 0, "html": ""}
    data: {"error": "..."}                                   instead of done

Promises: the page answers at any time; a client that is gone costs one step at most; a stream ends in done or error,
never in silence. No conversation is stored or logged. No other site's page can reach this one, and where others than
this machine can, every request but for the page's own files needs the token.
"""

import asyncio
import html
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import Field, ValidationError
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.access import Access, Guard
from nanochat.api import (
    LIMITS,
    Answer,
    ApiError,
    ChatRequest,
    Conversation,
    Drawing,
    OpenAI,
    Strict,
    TextRequest,
    error_body,
    json_response,
    problem,
    shorten,
    usage,
)
from nanochat.common import UserError
from nanochat.conversation import render_within
from nanochat.engine import Request as Continuation
from nanochat.markdown import Renderer
from nanochat.runs import runs_router
from nanochat.serving import Busy, Part, Reply, Serving
from nanochat.tokenizer import Tokenizer

HEADER_SECONDS = 10  # to send a request's headers in, and to send the first request after connecting
SEND_SECONDS = 30  # that a client may leave its answer unread
DRAIN_SECONDS = 20  # that running replies have when the server ends
RETRY_SECONDS = 5
PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Defaults:
    """What a request that doesn't say otherwise gets. Raises UserError for what a request may not ask."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512

    def __post_init__(self) -> None:
        try:
            Drawing(**vars(self))
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            given = f"--{name.replace('_', '-')}={first['input']}"
            raise UserError(f"{given}: {first['msg'].replace('Input', 'it', 1)}") from None


# -----------------------------------------------------------------------------
# Replies


class Service:
    """What the routes share: the model behind the Serving, and how requests are put to it."""

    def __init__(self, serving: Serving, tokenizer: Tokenizer, context: int, model: str, defaults: Defaults):
        self.serving, self.tokenizer, self.context = serving, tokenizer, context
        self.model, self.defaults = model, defaults
        self.renderer = Renderer()

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.model, "nanochat"):
            message = f"there is no model {shorten(name)} here, but {self.model}"
            raise ApiError(404, message, "model", "model_not_found")

    async def read_chat(self, body: Conversation) -> tuple[list[int], int]:
        """Its tokens, and how many of its oldest messages are left out so that there is room for the reply."""
        room = self.context - min(body.max_tokens or self.defaults.max_tokens, self.context // 4)
        return await asyncio.to_thread(render_within, body.rendered(), self.tokenizer, room)

    def submit(
        self, prompts: Sequence[tuple[list[int], int | None]], copies: int, body: Drawing, top: int | None
    ) -> list[Reply]:
        """A reply for each copy of each (prompt, token from which on it is repeated), in the line."""
        sampling = body.sampling(vars(self.defaults), top)
        replies = [
            Reply(Continuation(tokens, sampling, stream=copy), self.tokenizer, body.stops(), echo)
            for tokens, echo in prompts
            for copy in range(copies)
        ]
        try:
            self.serving.submit(replies)
        except Busy as busy:
            status, retry = (503 if busy.ended else 429), str(RETRY_SECONDS)
            raise ApiError(status, f"{busy}; try again in a few seconds", None, "busy", Retry_After=retry) from None
        return replies

    def stream(self, replies: Sequence[Reply], lines: AsyncIterator[str], **headers: str) -> Response:
        """Server-sent events; the replies end when the client goes, also while they wait."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers}  # nginx is not to collect them
        end = BackgroundTask(self.serving.cancel, replies)  # unlike a `finally` in lines also where they never began
        return StreamingResponse(lines, media_type="text/event-stream", headers=headers, background=end)

    async def whole(self, request: Request, replies: Sequence[Reply]) -> list[list[Part]]:
        """All parts of each reply. They end when the client goes; then nobody reads what this returns."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.serving.cancel(replies)

        watcher, found = asyncio.create_task(watch()), [list[Part]() for _ in replies]
        try:
            async for index, parts, _ in self.serving.follow(replies):
                if index >= 0:
                    found[index] += parts
        finally:
            watcher.cancel()
            self.serving.cancel(replies)
        for reply in replies:
            if failure := failed(reply):
                raise failure
        return found

    async def openai(
        self, request: Request, body: OpenAI, replies: list[Reply], answer: Answer, left_out: int = 0
    ) -> Response:
        """The answer to a request for completions."""
        headers = {"X-Nanochat-Left-Out": str(left_out)} if left_out else {}
        if body.stream:
            return self.stream(replies, openai_events(self.serving, replies, answer, body.wants_usage), **headers)
        found = await self.whole(request, replies)
        choices = [
            answer.whole(index, parts, reply.finished or "")
            for index, (parts, reply) in enumerate(zip(found, replies, strict=True))
        ]
        return json_response(answer.body(choices, chunk=False, usage=count(replies)), headers=headers)


def failed(reply: Reply) -> ApiError | None:
    """Why there is no reply, if so."""
    if reply.error:
        return ApiError(400 if isinstance(reply.error, UserError) else 500, str(reply.error))
    return ApiError(503, "the server ends", Retry_After=str(RETRY_SECONDS)) if reply.finished == "cancelled" else None


def count(replies: Sequence[Reply]) -> dict[str, int]:
    """OpenAI's usage; a prompt that several replies continue counts once."""
    prompts = [len(reply.request.prompt) for reply in replies if reply.request.stream == 0]
    return usage(sum(prompts), sum(len(reply.request.tokens) for reply in replies))


def event(content: object) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def openai_events(
    serving: Serving, replies: Sequence[Reply], answer: Answer, wants_usage: bool
) -> AsyncIterator[str]:
    """A stream as OpenAI's clients expect it: a chat begins with the role, a choice ends with a reason and no text."""
    more = {"usage": None} if wants_usage else {}

    def chunk(choice: dict[str, Any]) -> str:
        return event(answer.body([choice], chunk=True, **more))

    for index in range(len(replies) if answer.chat else 0):
        yield chunk(answer.opening(index))
    async for index, parts, finished in serving.follow(replies):
        for part in parts:
            yield chunk(answer.piece(index, part))
        if finished and (failure := failed(replies[index])):
            yield event(error_body(failure.status_code, failure.detail)) + "data: [DONE]\n\n"
            return
        if finished:
            yield chunk(answer.closing(index, replies[index].finished or ""))
        if index < 0:
            yield ": nothing new\n\n"
    if wants_usage:
        yield event(answer.body([], chunk=True, usage=count(replies)))
    yield "data: [DONE]\n\n"


async def page_events(serving: Serving, reply: Reply, left_out: int, renderer: Renderer) -> AsyncIterator[str]:
    """The events of POST /chat/completions."""
    ahead, text = 0, ""
    if left_out:
        yield event({"left_out": left_out})
    async for index, parts, _ in serving.follow([reply]):
        if reply.ahead != ahead:
            ahead = reply.ahead
            yield event({"waiting": ahead})
        for part in parts:
            text += part.text if part.kind == "text" else ""
            yield event({"token": part.text, "kind": part.kind, "gpu": reply.worker})
        if index < 0:
            yield ": nothing new\n\n"
    if reply.error:
        yield event({"error": str(reply.error)})
        return
    counts = {"prompt_tokens": len(reply.request.prompt), "completion_tokens": len(reply.request.tokens)}
    rendered = await renderer.render(text)
    yield event({"done": True, "finish_reason": reply.finished, **counts, "left_out": left_out, "html": rendered})


# -----------------------------------------------------------------------------
# The application


class RenderRequest(Strict):
    text: Annotated[str, Field(max_length=LIMITS["characters"])]


class Figures:
    """Serving.stats() for Prometheus."""

    def __init__(self, serving: Serving):
        self.serving = serving

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for name, value in self.serving.stats().items():
            now = name in ("active", "waiting", "tokens_per_second", "uptime_seconds")
            yield (GaugeMetricFamily if now else CounterMetricFamily)(f"nanochat_{name}", name.replace("_", " "), value)


def create_app(
    serving: Serving,
    tokenizer: Tokenizer,
    context: int,
    model: str = "nanochat",
    defaults: Defaults | None = None,
    access: Access | None = None,
    root_path: str = "",
) -> FastAPI:
    """The application: `context` is the model's sequence length in tokens, `model` its name in the API and on the page,
    `root_path` the prefix of a proxy. `serving` runs until it is closed.
    """
    service = Service(serving, tokenizer, context, model, defaults or Defaults())
    registry = CollectorRegistry()
    registry.register(Figures(serving))
    ProcessCollector(registry=registry)
    app = FastAPI(
        title="nanochat", docs_url=None, redoc_url=None, redirect_slashes=False,
        responses={"4XX": {"description": "refused, with the reason"}, "5XX": {"description": "busy or failed"}},
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(GZipMiddleware)
    app.add_middleware(Guard, access=access or Access(), prefix=root_path)
    add_api(app, service)
    add_page(app, service, registry)
    app.include_router(runs_router(service.renderer.render))
    app.mount("/static", StaticFiles(directory=PAGE))

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> Response:
        return problem(first_of(error))

    @app.exception_handler(UserError)
    async def bad_request(request: Request, error: UserError) -> Response:
        return problem(ApiError(400, str(error)))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return problem(error)

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return problem(ApiError(500, f"the server failed ({type(error).__name__}); its terminal says where"))

    return app


def first_of(error: RequestValidationError) -> ApiError:
    """The mistake that lies deepest: of the forms that a value may have, the one that was meant."""
    worst = max(error.errors(), key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    place = [str(step) for step in worst["loc"][1:] if isinstance(step, int) or str(step).isidentifier()]
    place = [step for step in place if step not in ("str", "int")]  # forms, not fields
    name = ".".join(place) or "the body"
    why = worst["ctx"]["error"] if worst["type"] == "json_invalid" else worst["msg"]
    given = "" if worst["type"] in ("missing", "json_invalid") else f" (given {shorten(worst['input'])})"
    return ApiError(400, f"{shorten(name)[1:-1]}: {why}{given}", shorten(name)[1:-1] if place else None, worst["type"])


def add_api(app: FastAPI, service: Service) -> None:
    """OpenAI's routes."""
    started = int(time.time())
    about = {"id": service.model, "object": "model", "created": started, "owned_by": "nanochat"}

    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [about]})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        service.check_model(name)
        return json_response(about)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        service.check_model(body.model)
        tokens, left_out = await service.read_chat(body)
        replies = service.submit([(tokens, None)], body.n or 1, body, body.top())
        answer = Answer(True, service.model, service.tokenizer, body.top())
        return await service.openai(request, body, replies, answer, left_out)

    @app.post("/v1/completions")
    async def completions(request: Request, body: TextRequest) -> Response:
        service.check_model(body.model)
        prompts = await asyncio.to_thread(body.prompts, service.tokenizer, service.context)
        asked = [(tokens, begin if body.echo else None) for tokens, begin in prompts]
        replies = service.submit(asked, body.n or 1, body, body.logprobs)
        answer = Answer(False, service.model, service.tokenizer, body.logprobs)
        return await service.openai(request, body, replies, answer)


def add_page(app: FastAPI, service: Service, registry: CollectorRegistry) -> None:
    """What the page asks, and what those ask who look after the server."""
    about = {"model": service.model, "context": service.context, "limits": LIMITS, "defaults": asdict(service.defaults)}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        warm = BackgroundTask(service.renderer.render, "")  # its first answer takes longer than the others
        return HTMLResponse((PAGE / "index.html").read_text(encoding="utf-8"), background=warm)

    @app.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok", "ready": service.serving.is_ready(), **about})

    @app.get("/stats")
    async def stats() -> Response:
        return json_response(service.serving.stats())

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app))

    @app.post("/render")
    async def render(body: RenderRequest) -> Response:
        return json_response({"html": await service.renderer.render(body.text)})

    @app.post("/chat/completions")
    async def chat(body: Conversation) -> Response:
        tokens, left_out = await service.read_chat(body)
        replies = service.submit([(tokens, None)], 1, body, None)
        return service.stream(replies, page_events(service.serving, replies[0], left_out, service.renderer))


def docs_page(app: FastAPI) -> str:
    """The schema's routes as a page that needs nothing else."""
    rows = []
    for path, methods in app.openapi()["paths"].items():
        for method, about in methods.items():
            body = about.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            rows.append(f"<tr><td>{method.upper()}<td>{html.escape(path)}<td>{body.get('$ref', '').rpartition('/')[2]}")
    table = "<table><tr><th>method<th>path<th>body" + "".join(rows) + "</table>"
    rest = '<p>Everything about them: <a href="openapi.json">openapi.json</a>'
    return f"<!doctype html><title>nanochat: API</title><h1>API</h1>{table}{rest}"


# -----------------------------------------------------------------------------
# The process


class Protocol(H11Protocol):
    """uvicorn's, which waits for ever for a client that sends no request, or does not read its answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.reading = self.loop.call_later(HEADER_SECONDS, transport.abort)
        self.writing: asyncio.TimerHandle | None = None

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle and not self.cycle.response_complete:
            self.reading.cancel()

    def on_response_complete(self) -> None:
        self.reading.cancel()
        self.reading = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.writing = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.writing:
            self.writing.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.reading.cancel()
        self.resume_writing()


class Server(uvicorn.Server):
    """uvicorn, which ends by a signal as a service should: takes nothing new, gives running replies DRAIN_SECONDS, then
    cancels them, and exits with 0. A second signal cancels at once.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit, self.force_exit = True, self.should_exit

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        service: Service = self.config.app.state.service  # type: ignore[union-attr]
        service.serving.ending = True
        for server in self.servers:
            server.close()
        end = time.monotonic() + DRAIN_SECONDS
        while not service.serving.is_idle() and not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(service.serving.close)
        self.force_exit = False  # the streams have their last events to send, for which uvicorn waits 5 seconds
        await super().shutdown(sockets)
        await service.renderer.stop()


def make_server(app: FastAPI) -> Server:
    """A server for create_app()'s application; server.run(sockets=[listen(...)]) serves until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(app, http=Protocol, ws="none", lifespan="off", log_level="warning", server_header=False)
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
