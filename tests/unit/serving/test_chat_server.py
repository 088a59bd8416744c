"""The limits of the chat server, tested by real requests to a port of this machine."""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from dschat.serving import guard, rate_limit
from dschat.serving import server as chat_server
from dschat.serving.answering import Settings
from dschat.serving.app import Address, make_app
from dschat.serving.chat_model import Answer, Sampling
from dschat.serving.guard import Limits, host_allowed
from dschat.serving.rate_limit import RateLimit
from dschat.serving.requests import Bounds
from dschat.serving.server import ChatServer, open_host_warning

LIMITS = dict(max_request_bytes=2000, requests_per_minute=1000, max_wait_s=0.2)
PAGE = "<style>p {}</style><script>ask()</script>"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
REFUSED_CLOSED = (http.client.HTTPException, ConnectionError)


class Backwards:
    """A model that answers with the last message backwards."""

    format = "chat"
    path = "models/backwards"

    def fit(self, messages):
        return [1, 2, 3], 0

    def answer(self, ids, *, stop, show, **options) -> Answer:
        show("olleh")
        return Answer("olleh", 5, True)

    def as_turn(self, text: str) -> str:
        return text


def model_of(answer):
    """Return a model whose answers `answer` gives; it is called with `stop`."""
    model = Backwards()
    model.answer = lambda ids, *, stop, **options: answer(stop)
    return model


def make_test_app(*models, host="127.0.0.1", public_url=None, page=PAGE, limits=None, **more):
    chats = {f"model{i}": model for i, model in enumerate(models or [Backwards()])}
    bounds = Bounds(tuple(chats), max_turns=2, settings=Settings(16, Sampling()))
    return make_app(
        chats,
        bounds,
        address=Address(host, public_url),
        limits=Limits(**{**LIMITS, **(limits or {})}),
        page=page,
        **more,
    )


@contextmanager
def run_server(server):
    """Run a server in a thread."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def serving(*models, host: str = "127.0.0.1", public_url=None, **limits):
    """Run a server on a free port."""
    app = make_test_app(*models, host=host, public_url=public_url, limits=limits)
    with run_server(ChatServer(app, host, 0, behind_proxy=bool(public_url))) as server:
        yield server


def request(server, *, method: str = "POST", path: str = "/chat", body=HELLO, **headers):
    """Send a request; return status, headers and body. Headers that are None are left out."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    host, port = server.address
    sent = {
        "Host": f"{host}:{port}",
        "Content-Type": "application/json",
        "Content-Length": str(len(data or b"")),
    }
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection(host, port, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(data)
    response = connection.getresponse()
    found = response.read()
    connection.close()
    return response.status, response.headers, found


def error(found) -> str:
    return json.loads(found[2])["error"]


def test_an_answer_and_the_page():
    with serving() as server:
        status, headers, body = request(server)
        assert (status, json.loads(body), headers["Content-Type"]) == (
            200,
            {"text": "olleh", "num_tokens": 5, "ended": True, "left_out": 0},
            "application/json",
        )
        status, headers, body = request(server, method="GET", path="/", body=None)
        assert (status, body.decode(), headers["Content-Type"]) == (
            200,
            PAGE,
            "text/html; charset=utf-8",
        )
    assert "Server" not in headers
    assert (
        headers["X-Content-Type-Options"] == "nosniff"
        and "default-src 'none'" in headers["Content-Security-Policy"]
    )


PATHS = ("/chat.py", "/../chat.py", "//etc/passwd", "/page.html", "/%2e%2e/README.md", "/docs")


def test_no_path_of_a_request_is_a_file():
    with serving() as server:
        found = {
            (method, path): request(server, method=method, path=path)[0]
            for method in ("GET", "POST")
            for path in PATHS
        }
        assert set(found.values()) == {404}, found
        assert request(server, method="GET", path="/chat")[0] == 404


# The body of a request, and what the message must contain.
WRONG = {
    "no JSON": (b"{", "the body is not JSON: Expecting property name"),
    "nothing": (b"", "the body is not JSON"),
    "no text": (b'{"messages": "\xff"}', "the body is not JSON: 'utf-8' codec"),
    "deep": (b"[" * 1999, "the body is not JSON: maximum recursion depth"),
    "a list": ([], "the body is a JSON list, not an object"),
    "no messages": ({}, 'no field "messages"'),
    "another field": (
        {**HELLO, "file": "/etc/passwd"},
        "unknown field 'file'; known: messages, models",
    ),
    "messages of another type": ({"messages": "hello"}, 'field "messages" is "hello", not a list'),
    "no message": ({"messages": []}, 'field "messages" is an empty list'),
    "another role": ({"messages": [{"role": "root", "content": "a"}]}, "messages[0] is"),
    "no content": (
        {"messages": [{"role": "user"}]},
        'field "messages[0].content" is null, not a string',
    ),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid UTF-8"),
    "the model's last": (
        {"messages": [{"role": "assistant", "content": "a"}]},
        "does not end with a message of the user",
    ),
    "too many turns": (
        {"messages": HELLO["messages"] * 5},
        "5 messages, 0 of them from the system: at most 4",
    ),
    "systems": (
        {"messages": [{"role": "system", "content": "a"}] * 2 + HELLO["messages"]},
        "3 messages, 2 of them from the system",
    ),
    "too many tokens": (
        {**HELLO, "max_new_tokens": 17},
        "max_new_tokens is 17; give a whole number from 1 to 16",
    ),
    "no tokens": ({**HELLO, "max_new_tokens": 0}, "max_new_tokens is 0"),
    "half a token": ({**HELLO, "max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
    "true": ({**HELLO, "max_new_tokens": True}, "max_new_tokens is true"),
}


def test_a_wrong_body_is_named():
    with serving() as server:
        for name, (body, word) in WRONG.items():
            found = request(server, body=body)
            assert found[0] == 400 and word in error(found), (name, found)
        assert request(server)[0] == 200


def test_the_largest_allowed_request_is_answered():
    turns = [
        {"role": role, "content": role}
        for role in ("system", "user", "assistant", "assistant", "user")
    ]
    with serving() as server:
        found = request(server, body={"messages": turns, "max_new_tokens": 16})
    assert found[0] == 200


def test_a_large_request_is_refused_unread():
    with serving() as server:
        size = len(json.dumps(HELLO))
        assert request(server, body=json.dumps(HELLO).encode() + b" " * (2000 - size))[0] == 200
        for extra in (2001, 500_000):
            found = request(server, body=json.dumps(HELLO).encode() + b" " * (extra - size))
            assert (found[0], error(found)) == (
                413,
                f"{extra} bytes are more than 2000 (--max_request_bytes)",
            )
        with socket.create_connection(server.address, timeout=10) as client:
            client.sendall(
                b"POST /chat HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            )
            client.sendall(b"Content-Length: 200000\r\n\r\n")
            time.sleep(0.05)  # the response is there while the client still sends
            for _ in range(2):
                client.sendall(b" " * 100_000)
                time.sleep(0.05)
            assert client.makefile("rb").readline().split()[1] == b"413"
        # A body that is announced but never sent is refused all the same.
        assert request(server, body=None, Content_Length=str(10**12))[0] == 413


def test_a_body_needs_its_length():
    with serving() as server:
        assert request(server, Content_Length=None)[0] == 411
        # No body: the server closes without reading it, which could reset the connection before
        # the answer is read.
        for length in ("-1", "ten", "1e3", "9" * 30):
            assert request(server, body=None, Content_Length=length)[0] == 400


def test_a_body_that_ends_early_and_one_that_never_comes(monkeypatch):
    monkeypatch.setattr(guard, "SOCKET_TIMEOUT_S", 0.5)
    with serving() as server:
        assert request(server, Content_Length="1000")[0] == 408
        with socket.create_connection(server.address, timeout=10) as client:
            client.sendall(
                b"POST /chat HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            )
            client.sendall(b"Content-Length: 1000\r\n\r\n{}")
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b""
        assert request(server)[0] == 200
        monkeypatch.setattr(chat_server, "SOCKET_TIMEOUT_S", 0.3)
        with socket.create_connection(server.address, timeout=5) as silent:
            assert silent.recv(100) == b""


def test_requests_above_the_rate_have_to_wait():
    with serving(requests_per_minute=3) as server:
        assert [request(server)[0] for _ in range(3)] == [200] * 3
        found = request(server)
        assert found[0] == 429 and "more than 3 requests within a minute" in error(found)
        assert 50 < int(found[1]["Retry-After"]) <= 60
        assert request(server, method="GET", path="/", body=None)[0] == 200


def test_the_rate_is_per_minute_and_address(monkeypatch):
    now = [0.0]
    rate = RateLimit(2, clock=lambda: now[0])
    assert [rate.wait_s("a"), rate.wait_s("a")] == [0, 0]
    now[0] = 10.0
    assert rate.wait_s("a") == 50 and rate.wait_s("b") == 0
    now[0] = 60.0
    assert rate.wait_s("a") == 0
    monkeypatch.setattr(rate_limit, "MAX_ADDRESSES", 2)
    assert rate.wait_s("c") == 60  # a and b are still counted
    now[0] = 71.0
    assert rate.wait_s("c") == 0  # b is no longer counted
    assert set(rate._times) == {"a", "c"}


def test_one_answer_at_a_time_and_a_bounded_wait():
    begun = threading.Event()
    may_end = threading.Event()
    calls = []

    def slow(stop) -> Answer:
        calls.append("in")
        assert calls.count("in") - calls.count("out") == 1
        begun.set()
        assert may_end.wait(10)
        calls.append("out")
        return Answer("", 1, True)

    with serving(model_of(slow), max_wait_s=1) as server:
        first: list = []
        thread = threading.Thread(target=lambda: first.append(request(server)))
        thread.start()
        assert begun.wait(10)
        started = time.monotonic()
        found = request(server)
        assert found[0] == 503 and "the model was busy for 1 s (--max_wait_s)" in error(found)
        assert 1 <= time.monotonic() - started < 5 and found[1]["Retry-After"] == "1"
        assert request(server, body={})[0] == 400  # does not wait for the model
        threading.Timer(0.05, may_end.set).start()
        assert request(server)[0] == 200  # it waited for the first to end
        thread.join()
        assert first[0][0] == 200


def test_closing_cuts_the_answer_refuses_waiting_requests_and_ends_all_threads():
    begun = threading.Event()

    def answer(stop) -> Answer:
        begun.set()
        deadline = time.monotonic() + 20
        while not stop():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return Answer("", 1, False)

    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool, socket.socket() as silent:
        with serving(model_of(answer), max_wait_s=20) as server:
            silent.connect(server.address)  # sends nothing
            asked = [pool.submit(request, server) for _ in range(2)]
            assert begun.wait(10)
            while len(server.server_state.connections) < 3:
                assert time.monotonic() < started + 10
                time.sleep(0.001)
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith("answers")]
        assert time.monotonic() - started < min(chat_server.SOCKET_TIMEOUT_S, 20)
        for future in asked:
            found = future.result()
            assert found[0] == 503 and "shutting down" in error(found)


def test_a_failed_answer_reveals_nothing_and_the_next_request_is_answered():
    answers = iter([RuntimeError("a secret"), Answer("", 1, True)])

    def answer(stop) -> Answer:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    with serving(model_of(answer)) as server:
        found = request(server)
        assert found[0] == 500 and "secret" not in error(found)
        assert request(server)[0] == 200


def test_hosts_other_than_this_server_are_refused():
    hosts = ("evil.example", "evil.example:80", "localhost.evil.example", "", "a@localhost")
    with serving() as server:
        for host in hosts:
            for method, path in (("POST", "/chat"), ("GET", "/"), ("GET", "/v1/models")):
                found = request(server, method=method, path=path, Host=host)
                assert found[0] == 403 and "Host" in found[2].decode(), (host, path)
        assert request(server, Host=None)[0] == 400


def test_a_proxy_with_encryption_is_allowed_by_its_address():
    public = "https://chat.example.org"
    with serving() as server:
        assert request(server, Origin=public)[0] == 403
        assert "--public_url" in error(request(server, Origin=public))
    with serving(public_url=public, requests_per_minute=2) as server:
        # A proxy passes the name on, or puts the server's address in its place.
        assert request(server, Host="chat.example.org", Origin=public)[0] == 200
        assert request(server, Origin=public, X_Forwarded_For="192.0.2.1")[0] == 200
        for origin in ("http://chat.example.org.evil", "https://evil.example"):
            assert request(server, Origin=origin)[0] == 403
        # The rate counts the clients of the proxy, each by itself.
        assert request(server, X_Forwarded_For="192.0.2.1")[0] == 200
        assert request(server, X_Forwarded_For="192.0.2.1")[0] == 429
        assert request(server, X_Forwarded_For="192.0.2.2")[0] == 200


def test_hosts_of_this_server():
    for header in (
        "localhost",
        "LOCALHOST:8000",
        "127.0.0.1:1",
        "[::1]:80",
        "192.168.0.3",
        "box:80",
    ):
        assert host_allowed(header, "box"), header
    for header in ("box.evil", "127.0.0.1.evil", "[::1", "box/", "box localhost"):
        assert not host_allowed(header, "box"), header


def test_pages_of_other_sites_are_refused():
    with serving() as server:
        own = "http://{}:{}".format(*server.address)
        assert request(server, Origin=own)[0] == 200
        for origin in ("http://evil.example", "null", "https" + own[4:]):
            assert request(server, Origin=origin)[0] == 403
        for kind in ("text/plain", None, "application/x-www-form-urlencoded"):
            assert request(server, Content_Type=kind)[0] == 415


def test_it_listens_on_the_given_address_only():
    with serving() as server:
        host, port = server.address
        assert host == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            # The same machine by another address.
            socket.create_connection(("127.0.0.2", port), timeout=5)
        with pytest.raises(
            ValueError,
            match=f"--host 127.0.0.1 --port {port}: cannot listen on this address .*Give another",
        ):
            ChatServer(make_test_app(), host, port)


def test_too_many_connections_are_closed(monkeypatch):
    monkeypatch.setattr(chat_server, "MAX_CONNECTIONS", 2)
    with serving() as server:
        idle = [socket.create_connection(server.address, timeout=10) for _ in range(2)]
        with socket.create_connection(server.address, timeout=10) as third:
            assert third.recv(100) == b""
        for client in idle:
            client.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                assert request(server)[0] == 200
                break
            except REFUSED_CLOSED:
                assert time.monotonic() < deadline


def test_an_address_open_to_others_is_warned_of():
    for host in ("0.0.0.0", "::", "192.168.0.3", "box"):
        warning = open_host_warning(host)
        assert f"--host {host}. " in warning and "no password" in warning
    for host in ("127.0.0.1", "::1", "localhost"):
        assert open_host_warning(host) is None
