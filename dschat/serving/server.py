"""The chat server: uvicorn with limits on connections and their time.

It is made for one machine and a few people. There are no accounts and no encryption: put a proxy
server that has both in front of it if it is to be reached from other machines.
"""

import ipaddress
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from dschat.serving.guard import SOCKET_TIMEOUT_S

MAX_CONNECTIONS = 32


class _TimedProtocol(H11Protocol):
    """A connection that is closed if its request does not come in time."""

    def connection_made(self, transport) -> None:
        """Begin to count the time, or close a connection that is one too many."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.close()
            return
        self.loop.call_later(SOCKET_TIMEOUT_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None:  # the headers are not complete
            self.transport.close()


class ChatServer(uvicorn.Server):
    """A server of the application, which listens from the beginning.

    Args:
        app: made by ``make_app``.
        host: the address to listen on.
        port: the port; 0 takes a free one, which ``address`` holds.
        behind_proxy: believe a proxy on this machine which client it speaks for.

    Raises:
        ValueError: the server cannot listen on the address.
    """

    def __init__(self, app: FastAPI, host: str, port: int, *, behind_proxy: bool = False):
        config = uvicorn.Config(
            app,
            http=_TimedProtocol,
            ws="none",
            lifespan="on",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=behind_proxy,
            forwarded_allow_ips="127.0.0.1,::1",
            timeout_graceful_shutdown=int(SOCKET_TIMEOUT_S),
        )
        super().__init__(config)
        self.answering = app.state.answering
        self.socket = _listen(host, port)
        self.address: tuple[str, int] = self.socket.getsockname()[:2]

    def serve_forever(self) -> None:
        """Answer requests until ``stop`` or a signal."""
        try:
            self.run(sockets=[self.socket])
        finally:
            self.socket.close()

    def stop(self) -> None:
        """Cut the answer in progress, refuse waiting requests, and end."""
        self.answering.closing.set()
        self.should_exit = True

    def handle_exit(self, sig, frame) -> None:
        """Cut the answer in progress first: uvicorn waits for its response."""
        self.answering.closing.set()
        super().handle_exit(sig, frame)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: cannot listen on this address ({error}). Give another."
        ) from error
    return listener


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
