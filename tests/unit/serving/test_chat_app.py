"""Streams, votes, scores and OpenAI's protocol of the chat server."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastapi.testclient import TestClient

from dschat.config.chat import ChatConfig
from dschat.config.parse import parse_config
from dschat.data.forms import read_row
from dschat.data.prompt_files import read_rows
from dschat.demo.tiny_models import make_tiny_model
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from dschat.serving.chat_model import Answer
from dschat.serving.program import make_server
from dschat.serving.votes import PREFERENCES, UNDECIDED, Vote, Voted, VoteFiles
from tests.unit.serving.test_chat_server import HELLO, Backwards, make_test_app, serving

PAIR = {
    "messages": [{"role": "system", "content": "be short"}, *HELLO["messages"]],
    "answers": [
        {"model": "model0", "text": "hi", "score": 0.5},
        {"model": "model1", "text": "good day", "score": None},
    ],
    "best": 1,
    "temperature": 0.5,
}


class Words(Backwards):
    """A model that says what it was asked for, word by word."""

    def answer(self, ids, *, show, max_new_tokens, sampling, ends, **options) -> Answer:
        for word in (f"{max_new_tokens} ", f"{sampling.temperature:g} ", f"{sampling.seed}"):
            show(word)
        return Answer(f"{max_new_tokens} {sampling.temperature:g} {sampling.seed}", 3, not ends)


def client_of(*models, **more) -> TestClient:
    return TestClient(make_test_app(*models, **more), base_url="http://127.0.0.1")


def data_of(response) -> list:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_models_answer_side_by_side_in_one_stream():
    scored = []

    def score(messages, text, *, ended):
        scored.append((messages, text, ended))
        return 1.25

    body = {**HELLO, "models": ["model1", "model0"], "max_new_tokens": 3, "seed": 7}
    with client_of(Words(), Backwards(), score=score) as client:
        events = data_of(client.post("/stream", json=body))
        assert client.post("/stream", json={**body, "models": ["other"]}).status_code == 400
    ends = [event for event in events if event["event"] == "end"]
    assert [(end["index"], end["text"], end["score"]) for end in ends] == [
        (0, "olleh", 1.25),
        (1, "3 0 7", 1.25),
    ]
    pieces = [event["text"] for event in events if event["event"] == "text" and event["index"] == 1]
    assert pieces == ["3 ", "0 ", "7"]
    assert events[-1] == {"event": "done"}
    assert scored[0] == (HELLO["messages"], "olleh", True)


def test_a_failure_in_a_stream_is_an_event():
    class Failing(Backwards):
        def answer(self, ids, **options):
            raise RuntimeError("a secret")

    with client_of(Failing()) as client:
        events = data_of(client.post("/stream", json=HELLO))
    assert events[1]["event"] == "error" and "secret" not in json.dumps(events)


def test_a_closed_tab_frees_the_model():
    begun, ended = threading.Event(), threading.Event()

    class Endless(Backwards):
        def answer(self, ids, *, stop, show, **options) -> Answer:
            begun.set()
            deadline = time.monotonic() + 20
            while not stop() and time.monotonic() < deadline:
                show("word ")
                time.sleep(0.005)
            ended.set()
            return Answer("word ", 1, False)

    import http.client

    for path in ("/stream", "/chat"):
        begun.clear()
        ended.clear()
        with serving(Endless(), max_wait_s=5) as server:
            connection = http.client.HTTPConnection(*server.address, timeout=10)
            sent = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(HELLO), sent)
            assert begun.wait(5)
            assert not ended.is_set()
            connection.sock.close()
            assert ended.wait(3), path


def test_a_client_that_leaves_while_it_waits_gives_up_its_turn():
    from dschat.serving.answering import Answering
    from dschat.serving.guard import RequestError

    async def scene() -> None:
        answering = Answering({}, max_wait_s=5)

        async def gone() -> bool:
            return True

        with pytest.raises(RequestError, match="has left"):
            await answering.begin([], gone)
        await asyncio.wait_for(answering._turn.acquire(), 1)  # the turn is free again
        with pytest.raises(RequestError, match="has left"):
            await answering.begin([], gone)
        answering._turn.release()
        await asyncio.wait_for(answering._turn.acquire(), 1)  # nobody else took it

    asyncio.run(scene())


def test_openai_chat_completions():
    body = {"model": "model0", **HELLO, "max_completion_tokens": 4, "temperature": 0.5, "seed": 3}
    with client_of(Words()) as client:
        found = client.post("/v1/chat/completions", json={**body, "user": "me", "n": 1}).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = data_of(client.post("/v1/chat/completions", json={**body, **options}))
        cut = client.post("/v1/chat/completions", json={**HELLO, "stop": ["x"]}).json()
        listed = client.get("/v1/models").json()
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": "4 0.5 3"}
    assert found["choices"][0]["message"] == message
    assert found["choices"][0]["finish_reason"] == "stop"
    usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert found["usage"] == usage
    assert cut["choices"][0]["finish_reason"] == "length"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-2]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == "4 0.5 3"
    assert chunks[-3]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["usage"] == usage and chunks[-1] == "[DONE]"
    assert [model["id"] for model in listed["data"]] == ["model0"]


# Fields of a chat completion, the status, and what the message must contain.
REFUSED_FIELDS = (
    ({"model": "gpt-4"}, 404, "no model"),
    ({"n": 2}, 400, "n is 2"),
    ({"tools": [{}]}, 400, "tools is not supported"),
    ({"max_tokens": 17}, 400, "max_new_tokens is 17"),
    ({"temperature": float("nan")}, 400, "temperature is NaN"),
    ({"top_p": 0}, 400, "top_p is 0"),
    ({"top_k": 1.5}, 400, "top_k is 1.5"),
    ({"stop": [""]}, 400, "stop has"),
    ({"stream": "yes"}, 400, "stream is"),
)


def test_openai_errors_have_openais_form():
    with client_of() as client:
        for fields, status, word in REFUSED_FIELDS:
            content = json.dumps({**HELLO, **fields})
            sent = {"Content-Type": "application/json"}
            found = client.post("/v1/chat/completions", content=content, headers=sent)
            assert found.status_code == status, (fields, found.text)
            assert word in found.json()["error"]["message"], (fields, found.text)


def test_votes_are_pairs_that_step_2_reads(tmp_path):
    votes = VoteFiles(str(tmp_path / "votes"))
    with client_of(Backwards(), Backwards(), votes=votes) as client:
        assert client.get("/settings").json()["votes"] is True
        assert client.post("/vote", json=PAIR).json() == {"pairs": 1}
        assert client.post("/vote", json={**PAIR, "best": "tie"}).json() == {"pairs": 0}
        same = {**PAIR, "answers": [PAIR["answers"][0]] * 2}
        for wrong in ({**PAIR, "best": 2}, {**PAIR, "best": True}, same, {**PAIR, "answers": []}):
            assert client.post("/vote", json=wrong).status_code == 400
    rows = read_rows(str(tmp_path / "votes" / PREFERENCES), flag="--data_path", needs="rejected")
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [
        (PAIR["messages"], "good day", "hi")
    ]
    line = json.loads((tmp_path / "votes" / PREFERENCES).read_text())
    assert line["answers"]["chosen"]["model"] == "model1"
    assert line["answers"]["rejected"]["path"] == "models/backwards"
    assert line["answers"]["rejected"]["settings"]["temperature"] == 0.5
    undecided = (tmp_path / "votes" / UNDECIDED).read_text().splitlines()
    assert [json.loads(text)["vote"] for text in undecided] == ["tie"]


def test_a_server_without_votes_says_so():
    with client_of(Backwards(), Backwards()) as client:
        found = client.post("/vote", json=PAIR)
    assert found.status_code == 404 and "--votes" in found.json()["error"]


def test_votes_on_texts_to_continue_have_a_text_as_prompt(tmp_path):
    class Plain(Backwards):
        format = "plain"

    votes = VoteFiles(str(tmp_path))
    with client_of(Plain(), Plain(), votes=votes) as client:
        assert client.post("/vote", json={**PAIR, **HELLO}).json() == {"pairs": 1}
    row = read_row(json.loads((tmp_path / PREFERENCES).read_text()))
    assert (row.prompt, row.chosen, row.rejected) == ("hello", "good day", "hi")


def vote_of(*texts: str, best: int | str = 0) -> Vote:
    return Vote("hello", tuple(Voted("m", "p", text) for text in texts), best)


def test_the_best_of_three_gives_two_pairs_and_none_with_an_equal_answer(tmp_path):
    votes = VoteFiles(str(tmp_path))
    assert votes.add(vote_of("a", "b", "c", best=1)) == 2
    assert votes.add(vote_of("a", "a", "c", best=0)) == 1
    lines = [json.loads(line) for line in (tmp_path / PREFERENCES).read_text().splitlines()]
    pairs = [(line["chosen"], line["rejected"]) for line in lines]
    assert pairs == [("b", "a"), ("b", "c"), ("a", "c")]


def test_many_votes_at_once_are_whole_lines(tmp_path):
    votes = VoteFiles(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: votes.add(vote_of("a" * 5000, f"{i}")), range(40)))
    lines = (tmp_path / PREFERENCES).read_text().splitlines()
    assert sorted(int(json.loads(line)["rejected"]) for line in lines) == list(range(40))


def test_a_vote_that_the_disk_cuts_leaves_no_trace(tmp_path, monkeypatch):
    import os

    votes = VoteFiles(str(tmp_path))
    votes.add(vote_of("a", "b"))
    before = (tmp_path / PREFERENCES).read_bytes()
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        with pytest.raises(OSError, match="only 7 of"):
            votes.add(vote_of("a", "b"))
    assert (tmp_path / PREFERENCES).read_bytes() == before


def test_one_server_writes_votes_and_a_torn_file_is_refused(tmp_path):
    votes = VoteFiles(str(tmp_path))
    with pytest.raises(ValueError, match="another server writes to"):
        VoteFiles(str(tmp_path))
    votes.close()
    VoteFiles(str(tmp_path)).close()
    (tmp_path / PREFERENCES).write_text('{"prompt": "a')
    with pytest.raises(ValueError, match="the last line of .* is incomplete"):
        VoteFiles(str(tmp_path))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    source = str(make_tiny_model(base / "source", family="llama", std=0.5))
    tokenizer = load_tokenizer(source)
    reward = load_reward_model(source, dtype=torch.float32, tokenizer=tokenizer)
    reward.model.save_pretrained(base / "reward")
    tokenizer.save_pretrained(base / "reward")
    return {
        "sft": make_tiny_model(base / "sft", family="llama", std=0.5),
        "rlhf": make_tiny_model(base / "rlhf", family="gpt2", std=0.5),
        "reward": base / "reward",
    }


def test_two_models_and_a_reward_model_are_served(folders, tmp_path):
    words = ["--models", f"sft={folders['sft']}", f"rlhf={folders['rlhf']}", "--serve"]
    words += ["--port", "0", "--max_new_tokens", "5", "--reward_model", str(folders["reward"])]
    config = parse_config(ChatConfig, [*words, "--votes", str(tmp_path / "votes")])
    server = make_server(config)
    client = TestClient(server.config.app, base_url="http://127.0.0.1")
    with client:
        models = client.get("/settings").json()["models"]
        assert [model["name"] for model in models] == ["sft", "rlhf"]
        body = {**HELLO, "models": ["sft", "rlhf"]}
        events = data_of(client.post("/stream", json=body))
        alone = client.post("/chat", json={**HELLO, "models": ["rlhf"]}).json()
    server.socket.close()
    ends = [event for event in events if event["event"] == "end"]
    assert [end["num_tokens"] for end in ends] == [5, 5]
    assert ends[1]["text"] == alone["text"] != ends[0]["text"]
    assert ends[1]["score"] == alone["score"] != ends[0]["score"]


# Arguments, and what the message must contain.
BAD_FLAGS = (
    ("--models a=m", "--models needs --serve"),
    ("--serve --models m", "give NAME=PATH"),
    ("--serve --models a=m a=n", "same name"),
    ("--serve --models a=m b=n c=o d=p", "at most 3"),
    ("--serve --models a=m --path n", "give one of them"),
    ("--serve --path m --public_url chat.example.org", "--public_url chat.example.org"),
    ("--serve --path m --public_url https://a.example/b", "without a path"),
    ("--serve --path m --public_url https://[a", "--public_url https://[a"),
)


def test_wrong_flags_are_named():
    for words, text in BAD_FLAGS:
        with pytest.raises(ValueError) as error:
            parse_config(ChatConfig, words.split())
        assert text in str(error.value), words
