"""Who is answered, and what every answer and every request must keep to: names, pages, token, headers, sizes.

refused  403 another name or another site's page   401 no token   415 not JSON   431 headers   413 408 a body
"""

import asyncio
import contextlib
import hmac
import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.api import ApiError, problem, shorten

MAX_HEADER_BYTES = 16_384
MAX_BODY_BYTES = 1 << 20  # 32,000 characters, each as a \u escape pair of 12 bytes, are a third of it
BODY_SECONDS = 30  # to send a body in
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types nanochat"
)
SECURITY = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """Who is answered: those who ask for one of our names, from one of our pages, with the token if there is one."""

    host: str = "127.0.0.1"  # that is listened on
    public: frozenset[str] = frozenset()  # names of a proxy or tunnel before it
    token: str | None = None

    @property
    def hosts(self) -> frozenset[str]:
        own = {self.host.lower(), *([socket.gethostname().lower()] if is_any_address(self.host) else [])}
        return LOOPBACK | own | self.public

    def refusal(self, method: str, headers: Headers, free: bool) -> ApiError | None:
        """Why a request is not answered. DNS rebinding comes with a name that is not ours in Host (where all addresses
        are listened on an address is as good as a name: rebinding needs a name), another site's page with its own in
        Origin; a proxy may have rewritten Host, but no browser lets a page choose its Origin.
        """
        given, origin = headers.get("host", ""), headers.get("origin")
        name = name_of(f"//{given}")
        if name not in self.hosts and not (parse_address(name) and is_any_address(self.host)):
            advice = f"--public-host={name or 'NAME'}"
            return ApiError(403, f"Host {shorten(given)} is not served here; start with {advice} to serve it")
        if method not in ("GET", "HEAD") and origin is not None and origin.partition("://")[2] != given:
            site = name_of(origin)
            if site not in self.public:
                advice = f"if that is a proxy or tunnel to this server, start with --public-host={site or 'NAME'}"
                return ApiError(403, f"Origin {shorten(origin)} is another site; {advice}")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        right = scheme.lower() == "bearer" and hmac.compare_digest(token.encode(), (self.token or "").encode())
        if self.token and not free and not right:
            bearer = "expected the header Authorization: Bearer TOKEN, with the token that the server was started with"
            return ApiError(401, bearer, None, "invalid_api_key", WWW_Authenticate="Bearer")
        return None


def name_of(address: str) -> str:
    with contextlib.suppress(ValueError):
        return urlsplit(address).hostname or ""
    return ""


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


class Guard:
    """The app, with Access before it, the security headers on everything it answers, HEAD answered as GET and OPTIONS
    by what there is, and limits on headers and bodies. `prefix` is taken off where a proxy has left it on.
    """

    def __init__(self, app: ASGIApp, access: Access, prefix: str = ""):
        self.app, self.access, self.prefix = app, access, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, headers, path = scope["method"], Headers(scope=scope), scope["path"]
        if self.prefix and (path == self.prefix or path.startswith(self.prefix + "/")):
            path = path[len(self.prefix) :]
        static = path in ("", "/") or path.startswith("/static/")  # the page, the same for everybody

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                answered.update(SECURITY)
                answered.setdefault("Cache-Control", "no-cache" if static else "no-store")
            await send(message)

        # uvicorn leaves off the body of what answers a HEAD
        scope = {**scope, "path": path, "method": "GET" if method == "HEAD" else method}
        refused = self.access.refusal(method, headers, free=static or path == "/health") or misfit(method, headers)
        answer = self.app
        if refused:
            answer = problem(refused)
        elif path == "":
            answer = RedirectResponse(f"{self.prefix}/")  # the page's addresses are relative
        elif method == "OPTIONS":
            answer = options(scope)
        await answer(scope, limited(receive), send_with_headers)


def misfit(method: str, headers: Headers) -> ApiError | None:
    """What is wrong with the headers. Another site's page can send text and forms without asking, but not JSON."""
    if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
        return ApiError(431, f"the headers are larger than {MAX_HEADER_BYTES:,} bytes")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and kind != "application/json":
        return ApiError(415, f"Content-Type {shorten(kind)}; expected application/json")
    return None


def options(scope: Scope) -> Response:
    found = [route for route in scope["app"].routes if route.matches({**scope, "method": "GET"})[0] != Match.NONE]
    methods = {method for route in found for method in getattr(route, "methods", None) or ["GET"]}
    if not found:
        return problem(ApiError(404, "Not Found"))
    methods |= {"OPTIONS", *(["HEAD"] if "GET" in methods else [])}
    return Response(status_code=204, headers={"Allow": ", ".join(sorted(methods))})


def limited(receive: Receive) -> Receive:
    """`receive` that raises a 408 when the body is not there after BODY_SECONDS, a 413 when it is too large."""
    deadline: float | None = asyncio.get_running_loop().time() + BODY_SECONDS
    size = 0

    async def receive_within_limits() -> Message:
        nonlocal deadline, size
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {BODY_SECONDS} seconds") from None
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
        deadline = deadline if message.get("more_body") else None
        return message

    return receive_within_limits
