"""The server of a reward model's scores, read by the grader scoring_server."""

import pytest
import torch
from fastapi.testclient import TestClient

from dschat.data.row import Row
from dschat.demo.tiny_models import make_tiny_model
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from dschat.rewards.remote import ScoringServer
from dschat.serving import reward_server
from dschat.serving.reward_server import Scorer, make_app
from dschat.trainers.rewards import RetokenisedReward

CHAT = [{"role": "user", "content": "hi"}]
PROMPTS = ["a text", CHAT, "a text", "one more prompt that is longer"]
ANSWERS = [" yes", "no", " yes", ""]
ENDED = [True, True, False, True]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = str(make_tiny_model(tmp_path_factory.mktemp("reward") / "model", std=0.5))
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, dtype=torch.float32, tokenizer=tokenizer).eval()
    return Scorer(model, tokenizer, prompt_format="auto", batch_size=3)


def body(**changed) -> dict:
    return {"prompts": PROMPTS, "answers": ANSWERS, "ended": ENDED, **changed}


def test_the_grader_gets_the_scores_that_step_3_would_compute(scorer, monkeypatch):
    client = TestClient(make_app(scorer))
    grader = ScoringServer("http://test/score", batch_size=3)
    monkeypatch.setattr(
        grader._client, "post", lambda value: client.post("/score", json=value).json()
    )
    found = grader(PROMPTS, ANSWERS, conversations=PROMPTS, ended=ENDED)
    reward = RetokenisedReward(None, "m", scorer.encoder.tokenizer, prompt_format="auto")
    expected = []
    for prompt, answer, ended in zip(PROMPTS, ANSWERS, ENDED, strict=True):
        ids = torch.tensor([reward._ids(Row(prompt), answer, ended)])
        with torch.no_grad():
            values = scorer.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        expected.append(values[0, -1].item())
    assert found == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for score in found}) == 4  # the end token matters


def test_long_texts_are_cut_at_the_start(scorer):
    short = Scorer(
        scorer.model, scorer.encoder.tokenizer, prompt_format="auto", batch_size=1, max_tokens=4
    )
    client = TestClient(make_app(short))
    one, other = client.post("/score", json=body(prompts=["x", CHAT] * 2)).json()["scores"][::2]
    assert one != other  # ended or not
    scores = client.post("/score", json=body(answers=["abcdef"] * 4, ended=None)).json()["scores"]
    assert scores[0] == scores[2] == scores[3]


@pytest.mark.parametrize(
    "changed, status, words",
    [
        ({"answers": ["a"]}, 400, "4 prompts, 1 answers"),
        ({"answers": [1] * 4}, 422, "answers"),
        ({"prompts": [[{"role": "nobody"}]] * 4}, 400, "prompts[0]"),
        ({"prompts": None}, 422, "prompts"),
    ],
)
def test_bad_requests_are_explained(scorer, changed, status, words):
    reply = TestClient(make_app(scorer)).post("/score", json=body(**changed))
    assert reply.status_code == status and words in reply.json()["error"]


def test_an_empty_request_and_the_health(scorer):
    client = TestClient(make_app(scorer))
    assert client.post("/score", json={"prompts": [], "answers": []}).json() == {"scores": []}
    assert client.get("/health").json() == {"status": "ready"}


def test_a_token_and_the_size_of_requests_are_checked(scorer, monkeypatch):
    client = TestClient(make_app(scorer, token="secret"))
    assert client.post("/score", json=body()).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    assert client.post("/score", json=body(), headers=headers).status_code == 200
    chunks = iter([b"{}"])
    assert client.post("/score", content=chunks, headers=headers).status_code == 411
    monkeypatch.setattr(reward_server, "LARGEST_REQUEST", 10)
    assert client.post("/score", json=body(), headers=headers).status_code == 413
