"""Graders that ask a server, against a server in this process."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dschat.rewards import http_client
from dschat.rewards.http_client import JsonClient, ServerError
from dschat.rewards.registry import load_grader


class Server(ThreadingHTTPServer):
    """Answers with the replies of a list, then with those of a function of the request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.replies = []
        self.reply = lambda request: {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.requests.append((self.path, dict(self.headers), request))
        code, body, headers = 200, None, {}
        if server.replies:
            code, body, headers = server.replies.pop(0)
        if body is None:
            body = json.dumps(server.reply(request)).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def running():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running.requests.clear()
    running.replies.clear()
    return running


@pytest.fixture
def waits(monkeypatch):
    """List the seconds that a client would wait between attempts, and do not wait."""
    found = []
    monkeypatch.setattr(http_client.time, "sleep", found.append)
    return found


def lengths(request: dict) -> dict:
    return {
        "scores": [
            None if answer == "" else len(answer) + 0.5 * ended
            for answer, ended in zip(request["answers"], request["ended"], strict=True)
        ]
    }


def test_a_scoring_server_gets_batches_and_gives_scores_in_order(server):
    server.reply = lengths
    grader = load_grader(f"scoring_server(url='{server.url}/score', batch_size=2)")
    chat = [{"role": "user", "content": "hi"}]
    found = grader(
        ["[user]hi"] * 5,
        ["a", "bb", "", "dddd", "eeeee"],
        conversations=[chat] * 5,
        ended=[True, False, True, False, True],
        target=[1] * 5,
    )
    assert found == [1.5, 2, None, 4, 5.5]
    assert sorted(len(request["answers"]) for _, _, request in server.requests) == [1, 2, 2]
    path, headers, request = server.requests[0]
    assert path == "/score" and set(request) == {"prompts", "answers", "ended"}
    assert request["prompts"][0] == chat and "Authorization" not in headers


@pytest.mark.parametrize(
    "reply", [{}, [], {"scores": [1.0]}, {"scores": [1.0, "good"]}, {"scores": None}]
)
def test_a_server_without_one_score_for_each_answer_is_an_error(server, reply):
    server.reply = lambda request: reply
    grader = load_grader(f"scoring_server(url='{server.url}')")
    with pytest.raises(ServerError, match=server.url):
        grader(["p", "p"], ["a", "b"], conversations=["p", "p"], ended=[True, True])


def test_a_busy_server_is_asked_again_with_longer_waits(server, waits):
    server.reply = lambda request: {"fine": request}
    server.replies = [(503, b"busy", {}), (429, b"", {"Retry-After": "7"}), (200, None, {})]
    assert JsonClient(server.url, retries=2).post([1]) == {"fine": [1]}
    assert len(server.requests) == 3
    assert 0.25 <= waits[0] <= 0.5 and waits[1] == 7
    server.replies = [(500, b"broken", {})] * 3
    with pytest.raises(ServerError, match="answered 500: broken"):
        JsonClient(server.url, retries=2).post(1)
    assert server.replies == []


def test_errors_that_stay_are_not_tried_again(server, waits):
    for code, body, headers, words in (
        (400, b"no such model", {}, "400: no such model"),
        (302, b"", {"Location": "http://127.0.0.1:1/"}, "302: redirects are not followed"),
        (200, b"<html>", {}, "did not answer with JSON: b'<html>'"),
    ):
        server.replies = [(code, body, headers)]
        with pytest.raises(ServerError, match=words):
            JsonClient(server.url).post(1)
    assert len(server.requests) == 3 and waits == []


def test_a_reply_that_is_too_large_is_refused(server, monkeypatch):
    monkeypatch.setattr(http_client, "LARGEST_REPLY", 10)
    server.reply = lambda request: "a" * 20
    with pytest.raises(ServerError, match="more than 10 bytes"):
        JsonClient(server.url).post(1)


def test_a_server_that_is_not_there_is_named(waits):
    with pytest.raises(ServerError, match="127.0.0.1:9 cannot be reached"):
        JsonClient("http://127.0.0.1:9", retries=1, timeout_s=5).post(1)
    assert len(waits) == 1


def judge_reply(request: dict) -> dict:
    """Rate by the length of the answer after the last line break of the request."""
    answer = request["messages"][0]["content"].rpartition("=")[2]
    text = {"none": "I cannot.", "high": "11"}.get(answer, f"It is 3 long. Rating: {len(answer)}")
    return {"choices": [{"message": {"content": text}}]}


def test_a_language_model_judges(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.reply = judge_reply
    spec = (
        f"llm_judge(url='{server.url}/v1/', model='m', largest=10, key_env='JUDGE_KEY', "
        "prompt='{prompt}|{reference}|{largest}={answer}')"
    )
    answers = ["abcde", "none", "high", "{prompt}"]
    found = load_grader(spec)(["p"] * 4, answers, target=["r{answer}"] * 4)
    assert found[0] == 0.5 and found[3] == 0.8
    assert math.isnan(found[1]) and math.isnan(found[2])
    path, headers, request = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (request["model"], request["temperature"]) == ("m", 0)
    texts = {request["messages"][0]["content"] for _, _, request in server.requests}
    assert texts == {f"p|r{{answer}}|10={answer}" for answer in answers}
    server.reply = lambda request: {"choices": []}
    with pytest.raises(ServerError, match="gave no message"):
        load_grader(f"llm_judge(url='{server.url}', model='m')")(["p"], ["a"])


@pytest.mark.parametrize(
    "spec, words",
    [
        ("scoring_server(url='localhost')", "must begin with http"),
        ("scoring_server(url='http://a', batch_size=0)", "batch_size is 0"),
        ("scoring_server(url='http://a', timeout_s=0)", "timeout_s is 0"),
        ("scoring_server(url='http://a', key_env='NO_SUCH_KEY')", "NO_SUCH_KEY"),
        ("llm_judge(url='http://a', model='m', prompt='rate')", "no {answer}"),
        ("llm_judge(url='http://a')", "model"),
    ],
)
def test_bad_options_are_named_at_the_start(spec, words):
    with pytest.raises(ValueError, match=words):
        load_grader(spec)
