"""Answers by HTTP: one page, and POST /chat with JSON. Python's http.server, with limits on what a request may cost.

It is made for one machine and a few people. There are no accounts and no encryption: what is to be reached from
elsewhere belongs after a proxy server that has both.
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
MAX_CONNECTIONS = 32  # threads
DRAINED_BYTES = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits on what requests may cost."""

    max_request_bytes: int
    requests_per_minute: int  # of one address
    max_wait_s: float  # for the model, which answers one request at a time


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str, *, retry_after_s: float | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class ChatServer(ThreadingHTTPServer):
    """Serves the page and the answers until it is shut down.

    ``server_close`` ends what is under way and waits for it: a process that ends while a thread is inside the model's
    C++ code is aborted.
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
        """
        Args:
            host: the address to listen on.
            port: 0: any that is free; ``server_address`` tells it.
            page: the HTML of GET /, with at most one script and one style of its own and nothing from elsewhere.
            read: the body of POST /chat to what is to be answered; its ValueErrors are the client's to fix.
            answer: that to the JSON of the answer; it is called by one thread at a time, and is to return early once
                its second argument returns True.

        Raises:
            ValueError: the address cannot be listened on.
        """
        self.page = page.encode()
        self.policy = content_policy(page)
        self.read, self.answer, self.limits = read, answer, limits
        self.host = host.lower()
        self.turn = threading.Lock()
        self.closing = threading.Event()
        self._open: dict[socket.socket, threading.Thread] = {}
        self.rate = RateLimit(limits.requests_per_minute)
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"--host {host} --port {port}: cannot be listened on ({error}); give another."
            ) from error

    def process_request(self, request, client_address) -> None:
        """A thread for a connection, while there are not too many."""
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
        """The thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self._open[request]
            self._connections.release()

    def server_close(self) -> None:
        """Stop listening, cut short the answer that is being made, refuse those that wait, and end all threads."""
        self.closing.set()
        under_way = tuple(self._open.items())
        for connection, _ in under_way:
            with contextlib.suppress(OSError):  # it ended by itself
                connection.shutdown(socket.SHUT_RD)  # what is still to be sent is sent
        super().server_close()
        for _, thread in under_way:
            thread.join()

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no error of ours, and nothing of it belongs on the screen."""
        logger.debug("a connection ended early", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    server_version, sys_version = "dschat", ""
    timeout = SOCKET_TIMEOUT_S

    def do_GET(self) -> None:
        self._serve(self._page)

    def do_POST(self) -> None:
        self._serve(self._chat)

    def _serve(self, function: Callable[[], None]) -> None:
        try:
            self._check_origin()
            function()
        except Refused as refused:
            self._send_json(
                refused.status, {"error": str(refused)}, retry_after_s=refused.retry_after_s
            )
            self._drain()

    def _check_origin(self) -> None:
        """Only what this machine's own page or a program sends: no other site's page, and none whose name was made to
        point here (DNS rebinding).
        """
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not host_allowed(hosts[0], self.server.host):
            raise Refused(
                403, "the Host header is not a name of this server: use its address, or localhost"
            )
        if self.headers.get("Origin", f"http://{hosts[0]}") != f"http://{hosts[0]}":
            raise Refused(403, "requests from the pages of other sites are refused")

    def _page(self) -> None:
        if self.path != "/":
            raise Refused(404, "there is / and POST /chat, nothing else")
        self._send(200, self.server.page, "text/html; charset=utf-8")

    def _chat(self) -> None:
        if self.path != "/chat":
            raise Refused(404, "there is / and POST /chat, nothing else")
        server, limits = self.server, self.server.limits
        if wait_s := server.rate.wait_s(self.client_address[0]):
            message = f"more than {limits.requests_per_minute} requests within a minute (--requests_per_minute)"
            raise Refused(429, message, retry_after_s=wait_s)
        body = self._body()
        try:
            request = server.read(body)
        except ValueError as error:
            raise Refused(400, str(error)) from error
        if not server.turn.acquire(timeout=limits.max_wait_s):
            message = f"the model was busy for {limits.max_wait_s:g} s (--max_wait_s)"
            raise Refused(503, message, retry_after_s=max(1.0, limits.max_wait_s))
        try:
            answer = (
                {} if server.closing.is_set() else server.answer(request, server.closing.is_set)
            )
        except Exception as error:
            logger.exception("an answer failed")
            raise Refused(500, "the model failed; the server's log has the cause") from error
        finally:
            server.turn.release()
        if server.closing.is_set():
            raise Refused(503, "the server is ending")
        self._send_json(200, answer)

    def _body(self) -> bytes:
        # Other types can be sent by the pages of other sites without the browser asking here first.
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "the Content-Type must be application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise Refused(411, "a Content-Length is needed, in digits")
        if int(length) > self.server.limits.max_request_bytes:
            limit = self.server.limits.max_request_bytes
            raise Refused(413, f"{length} bytes are more than {limit} (--max_request_bytes)")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(408, f"nothing came for {SOCKET_TIMEOUT_S:g} s") from None
        if len(body) < int(length):
            raise Refused(400, f"the body ended after {len(body)} of {length} bytes")
        return body

    def _drain(self) -> None:
        """Read what a refused request still sends, up to a limit: closing on it could lose our answer on its way."""
        if self.command != "POST":
            return
        self.connection.settimeout(0.2)
        left = DRAINED_BYTES
        try:
            while left > 0 and (data := self.rfile.read1(65536)):
                left -= len(data)
        except OSError:  # a timeout too
            pass

    def _send_json(self, status: int, value: dict, *, retry_after_s: float | None = None) -> None:
        headers = {} if retry_after_s is None else {"Retry-After": str(math.ceil(retry_after_s))}
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
    """A Content-Security-Policy that lets a page run its own script and style and ask this server, and no more."""

    def own(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        sums = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{text}'" for text in sums) or "'none'"

    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def opened_warning(host: str) -> str | None:
    """Return a warning if `host` lets other machines in, else None."""
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = host.lower() == "localhost"
    if inside:
        return None
    return (
        f"warning: --host {host} is not this machine alone. Whoever reaches it can use the model; there is no password "
        "and no encryption."
    )
