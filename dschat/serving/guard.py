"""Checks of every request to the chat server: its origin, its rate and its size."""

import asyncio
import base64
import contextlib
import hashlib
import ipaddress
import json
import math
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response

from dschat.serving.rate_limit import RateLimit

SOCKET_TIMEOUT_S = 10.0  # for each read and write
DRAINED_BYTES = 1 << 20
DRAIN_TIMEOUT_S = 0.2

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """Limits on what requests may cost."""

    max_request_bytes: int
    requests_per_minute: int  # of one address
    max_wait_s: float  # for the models, which answer one request at a time


class RequestError(Exception):
    """A request that is refused; `status` is the HTTP status of the response."""

    def __init__(self, status: int, message: str, *, retry_after_s: float | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class Guard:
    """An ASGI middleware that refuses what a request may not do, and reads its body.

    Args:
        app: gets the requests that pass, with their body read.
        host: the name or address that the server listens on.
        public_url: the address at which a proxy server shows the page, or None.
        limits: limits on what requests may cost.
        policy: the Content-Security-Policy of all responses.
    """

    def __init__(self, app, *, host: str, public_url: str | None, limits: Limits, policy: str):
        self.app = app
        self.host = host.lower()
        public = urlsplit(public_url or "")
        self.public_host = public.netloc.lower()
        self.public_origin = f"{public.scheme}://{public.netloc}".lower() if public_url else ""
        self.limits = limits
        self.rate = RateLimit(limits.requests_per_minute)
        self.headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-store",
            "connection": "close",  # so that each connection has one request and one time limit
        }

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with the reason for which it is refused."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        timed_send = self._with_headers(send)
        headers = Headers(scope=scope)
        try:
            self._check_origin(headers)
            if scope["method"] == "POST":
                self._check_rate(scope)
                body = await self._read_body(headers, receive)
                receive = _replay(body, receive)
        except RequestError as error:
            if scope["method"] == "POST":
                await _drain(receive)
            await error_response(error, scope["path"])(scope, receive, timed_send)
            return
        await self.app(scope, receive, timed_send)

    def _with_headers(self, send: Send) -> Send:
        """Return `send` with the headers of all responses, and a limit on its time."""

        async def timed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in self.headers.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await asyncio.wait_for(send(message), SOCKET_TIMEOUT_S)

        return timed_send

    def _check_origin(self, headers: Headers) -> None:
        """Check that the request comes from this server's own page or from a program.

        Pages of other sites are refused, also those whose name was made to point at this machine
        (DNS rebinding).
        """
        hosts = headers.getlist("host")
        known = len(hosts) == 1 and (
            host_allowed(hosts[0], self.host)
            or (self.public_host and hosts[0].lower() == self.public_host)
        )
        if not known:
            raise RequestError(
                403,
                "the Host header is not a name of this server: use its address, or localhost; for "
                "a name that a proxy server has, start with --public_url",
            )
        origin = headers.get("origin")
        allowed = (None, f"http://{hosts[0]}", self.public_origin or None)
        if origin is not None and origin.lower() not in allowed and origin not in allowed:
            raise RequestError(
                403,
                "requests from the pages of other sites are refused; for a page that a proxy "
                "server shows, start with --public_url",
            )

    def _check_rate(self, scope: MutableMapping[str, Any]) -> None:
        address = (scope.get("client") or ("unknown",))[0]
        wait_s = self.rate.wait_s(address)
        if wait_s:
            raise RequestError(
                429,
                f"more than {self.limits.requests_per_minute} requests within a minute "
                "(--requests_per_minute)",
                retry_after_s=wait_s,
            )

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        # Pages of other sites can send other types without the browser's asking this server first.
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise RequestError(415, "the Content-Type must be application/json")
        length = headers.get("content-length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise RequestError(411, "a Content-Length is needed, in digits")
        limit = self.limits.max_request_bytes
        if int(length) > limit:
            raise RequestError(413, f"{length} bytes are more than {limit} (--max_request_bytes)")
        body = b""
        more = True
        while more:
            try:
                message = await asyncio.wait_for(receive(), SOCKET_TIMEOUT_S)
            except asyncio.TimeoutError:
                text = f"no data received for {SOCKET_TIMEOUT_S:g} s"
                raise RequestError(408, text) from None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) != int(length):
            raise RequestError(400, f"the body ended after {len(body)} of {length} bytes")
        return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `body` first."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _drain(receive: Receive) -> None:
    """Read what a refused request still sends, up to a limit.

    Closing the connection with unread data could lose the response on its way.
    """
    num_left = DRAINED_BYTES
    with contextlib.suppress(asyncio.TimeoutError):
        while num_left > 0:
            message = await asyncio.wait_for(receive(), DRAIN_TIMEOUT_S)
            num_left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                return


def error_response(error: RequestError, path: str) -> Response:
    """Return the response of a refused request, for paths of OpenAI's API in its form."""
    value: dict[str, Any] = {"error": str(error)}
    if path.startswith("/v1/"):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        value = {"error": {"message": str(error), "type": kind, "param": None, "code": None}}
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return JSONResponse(value, status_code=error.status, headers=headers)


def host_allowed(header: str, host: str) -> bool:
    """Return whether a Host header is localhost, an IP address, or `host`, with or without a port.

    A page whose name was made to point at this machine still sends its own name, never an address.
    """
    if not re.fullmatch(r"[0-9A-Za-z.:\[\]_-]+", header):
        return False
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return name in ("localhost", host)


def content_policy(page: str) -> str:
    """Return a Content-Security-Policy that allows a page's inline script and style.

    The page may send requests to this server, and nothing else.
    """
    return (
        f"default-src 'none'; script-src {_inline_hashes(page, 'script')}; "
        f"style-src {_inline_hashes(page, 'style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _inline_hashes(page: str, tag: str) -> str:
    """Return the policy's sources for the inline elements of a tag: their sha256 sums."""
    sources = []
    for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL):
        digest = hashlib.sha256(text.encode()).digest()
        sources.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    return " ".join(sources) or "'none'"


def parse_json(body: bytes) -> dict:
    """Return the object that a body holds.

    Raises:
        ValueError: it holds no JSON object.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"the body is a JSON {type(value).__name__}, not an object")
    return value
