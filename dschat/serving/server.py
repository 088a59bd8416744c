"""An HTTP server for a chat: one page, and POST /chat with JSON.

It is Python's http.server with limits on what a request may cost. It is made for one machine and a
few people. There are no accounts and no encryption: put a proxy server that has both in front of
it if it is to be reached from other machines.
"""

import base64
import contextlib
import hashlib
import ipaddress
import json
import logging
import math
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from dschat.serving.rate_limit import RateLimit

logger = logging.getLogger(__name__)

SOCKET_TIMEOUT_S = 10.0  # for each read and write
MAX_CONNECTIONS = 32  # each has a thread
DRAINED_BYTES = 1 << 20
NOT_FOUND = "not found: this server answers GET / and POST /chat"


@dataclass(frozen=True)
class Limits:
    """Limits on what requests may cost."""

    max_request_bytes: int
    requests_per_minute: int  # of one address
    max_wait_s: float  # for the model, which answers one request at a time


class RequestError(Exception):
    """A request that is refused; `status` is the HTTP status of the response."""

    def __init__(self, status: int, message: str, *, retry_after_s: float | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class ChatServer(ThreadingHTTPServer):
    """A server of the page and the answers.

    ``server_close`` stops the requests in progress and waits for their threads: a program that
    exits while a thread is inside the model's C++ code is aborted.

    Args:
        host: the address to listen on.
        port: the port; 0 takes a free one, which ``server_address`` holds.
        page: the HTML of GET /. It may have one inline script and one inline style, and loads
            nothing else.
        read: converts the body of POST /chat into the argument of `answer`. Its ValueErrors are
            reported to the client.
        answer: returns the JSON of the answer. It is called by one thread at a time, and should
            return early once its second argument returns True.
        limits: limits on what requests may cost.

    Raises:
        ValueError: the server cannot listen on the address.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        page: str,
        read: Callable[[bytes], object],
        answer: Callable[[object, Callable[[], bool]], dict],
        limits: Limits,
    ):
        self.page = page.encode()
        self.policy = content_policy(page)
        self.read = read
        self.answer = answer
        self.limits = limits
        self.host = host.lower()
        self.turn = threading.Lock()  # held while the model answers
        self.closing = threading.Event()
        self.rate = RateLimit(limits.requests_per_minute)
        self._open: dict[socket.socket, threading.Thread] = {}
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"--host {host} --port {port}: cannot listen on this address ({error}). "
                "Give another."
            ) from error

    def process_request(self, request, client_address) -> None:
        """Handle a connection in a new thread, or close it if there are too many."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        # Not a daemon: the interpreter, too, waits for it.
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), daemon=False
        )
        self._open[request] = thread
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left
            del self._open[request]
            self._connections.release()
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        """Handle a connection and then count it as closed."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self._open[request]
            self._connections.release()

    def server_close(self) -> None:
        """Stop listening, cut the answer in progress, refuse waiting requests, join all threads."""
        self.closing.set()
        connections = tuple(self._open.items())
        for connection, _ in connections:
            with contextlib.suppress(OSError):  # the client has closed it already
                # Only reading stops, so that pending responses are still sent.
                connection.shutdown(socket.SHUT_RD)
        super().server_close()
        for _, thread in connections:
            thread.join()

    def handle_error(self, request, client_address) -> None:
        """Log an error of a connection for debugging only: a client may leave at any time."""
        logger.debug("a connection ended early", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    server_version = "dschat"
    sys_version = ""  # else the Server header names Python's version
    timeout = SOCKET_TIMEOUT_S

    def do_GET(self) -> None:
        self._serve(self._send_page)

    def do_POST(self) -> None:
        self._serve(self._chat)

    def _serve(self, function: Callable[[], None]) -> None:
        """Call `function` and send its RequestError, if any, as the response."""
        try:
            self._check_origin()
            function()
        except RequestError as error:
            self._send_json(error.status, {"error": str(error)}, retry_after_s=error.retry_after_s)
            self._drain()

    def _check_origin(self) -> None:
        """Check that the request comes from this server's own page or from a program.

        Pages of other sites are refused, also those whose name was made to point at this machine
        (DNS rebinding).
        """
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not host_allowed(hosts[0], self.server.host):
            raise RequestError(
                403, "the Host header is not a name of this server: use its address, or localhost"
            )
        own_origin = f"http://{hosts[0]}"
        if self.headers.get("Origin", own_origin) != own_origin:
            raise RequestError(403, "requests from the pages of other sites are refused")

    def _send_page(self) -> None:
        if self.path != "/":
            raise RequestError(404, NOT_FOUND)
        self._send(200, self.server.page, "text/html; charset=utf-8")

    def _chat(self) -> None:
        """Answer POST /chat."""
        if self.path != "/chat":
            raise RequestError(404, NOT_FOUND)
        server = self.server
        limits = server.limits
        wait_s = server.rate.wait_s(self.client_address[0])
        if wait_s:
            message = (
                f"more than {limits.requests_per_minute} requests within a minute "
                "(--requests_per_minute)"
            )
            raise RequestError(429, message, retry_after_s=wait_s)
        body = self._read_body()
        try:
            request = server.read(body)
        except ValueError as error:
            raise RequestError(400, str(error)) from error
        if not server.turn.acquire(timeout=limits.max_wait_s):
            message = f"the model was busy for {limits.max_wait_s:g} s (--max_wait_s)"
            raise RequestError(503, message, retry_after_s=max(1.0, limits.max_wait_s))
        try:
            answer = {}
            if not server.closing.is_set():
                answer = server.answer(request, server.closing.is_set)
        except Exception as error:
            logger.exception("the model failed to answer a request")
            raise RequestError(500, "the model failed; see the server's log") from error
        finally:
            server.turn.release()
        if server.closing.is_set():
            raise RequestError(503, "the server is shutting down")
        self._send_json(200, answer)

    def _read_body(self) -> bytes:
        # Pages of other sites can send other types without the browser's asking this server first.
        if self.headers.get_content_type() != "application/json":
            raise RequestError(415, "the Content-Type must be application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise RequestError(411, "a Content-Length is needed, in digits")
        limit = self.server.limits.max_request_bytes
        if int(length) > limit:
            raise RequestError(413, f"{length} bytes are more than {limit} (--max_request_bytes)")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise RequestError(408, f"no data received for {SOCKET_TIMEOUT_S:g} s") from None
        if len(body) < int(length):
            raise RequestError(400, f"the body ended after {len(body)} of {length} bytes")
        return body

    def _drain(self) -> None:
        """Read what a refused request still sends, up to a limit.

        Closing the connection with unread data could lose the response on its way.
        """
        if self.command != "POST":
            return
        self.connection.settimeout(0.2)
        num_left = DRAINED_BYTES
        with contextlib.suppress(OSError):  # timeouts too
            while num_left > 0:
                data = self.rfile.read1(65536)
                if not data:
                    break
                num_left -= len(data)

    def _send_json(self, status: int, value: dict, *, retry_after_s: float | None = None) -> None:
        headers = {}
        if retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(retry_after_s))
        self._send(status, json.dumps(value).encode(), "application/json", **headers)

    def _send(self, status: int, body: bytes, content_type: str, **headers: str) -> None:
        headers |= {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": self.server.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args) -> None:
        logger.debug("%s " + format, self.client_address[0], *args)


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


def open_host_warning(host: str) -> str | None:
    """Return a warning if other machines can reach `host`, else None."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host.lower() == "localhost"
    if is_local:
        return None
    return (
        f"warning: other machines can reach --host {host}. Whoever reaches it can use the model; "
        "there is no password and no encryption."
    )
