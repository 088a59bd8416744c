"""The chat page in headless Chromium, at the size of a desktop and of a phone."""

import json
import shutil
import time

import pytest
from playwright import sync_api

from dschat.data.datasets import PairDataset
from dschat.data.prompt_files import read_rows
from dschat.demo.tiny_models import byte_tokenizer
from dschat.serving.chat_model import Answer
from dschat.serving.server import ChatServer
from dschat.serving.votes import PREFERENCES, UNDECIDED, VoteFiles
from tests.unit.serving.test_chat_server import Backwards, make_test_app, run_server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

SIZES = {"desktop": (1280, 800), "phone": (390, 780)}
HOSTILE = "<img src=x onerror=\"document.title='broken'\"> **bold** `code`\n\n- one\n- two"


class Talker(Backwards):
    """A model that streams its answer, and continues until it is stopped if asked to."""

    def __init__(self, text: str):
        self.text = text
        self.asked: list[list[dict]] = []
        self.num_stopped = 0

    def fit(self, messages):
        self.asked.append(messages)
        return [1], 0

    def answer(self, ids, *, show, stop, **options) -> Answer:
        text = self.text
        if "forever" in self.asked[-1][-1]["content"]:
            text = "word " * 2000
        shown = ""
        for word in text.split(" "):
            if stop():
                self.num_stopped += 1
                return Answer(shown, 1, False)
            show(word + " ")
            shown += word + " "
            time.sleep(0.01)
        return Answer(text, 4, True)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield launched
        launched.close()


def send(page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(params=SIZES)
def scene(request, browser, tmp_path):
    """Yield the page, its models and the folder of votes."""
    models = (Talker(HOSTILE), Talker("good day to you"))
    app = make_test_app(
        *models,
        page=None,
        votes=VoteFiles(str(tmp_path)),
        score=lambda messages, text, ended: len(text) / 2,
        limits=dict(max_request_bytes=65536, max_wait_s=5),
    )
    width, height = SIZES[request.param]
    with run_server(ChatServer(app, "127.0.0.1", 0)) as server:
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(10_000)
        errors: list = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: "Security" in line.text and errors.append(line.text))
        page.goto("http://{}:{}/".format(*server.address))
        page.wait_for_selector("#fields input", state="attached")
        yield page, models, tmp_path
        assert page.title() == "dschat" and not page.query_selector(".answer img")
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(overflow) == 0
        page.close()
        assert errors == []


def test_answer_stream_stop_and_vote(scene):
    page, (first, second), folder = scene
    send(page, "hello")
    page.wait_for_selector(".votes")
    answers = page.query_selector_all(".answer")
    assert [answer.query_selector(".name").inner_text() for answer in answers] == [
        "model0 (continues from here)",
        "model1",
    ]
    # Markdown becomes elements, and the text of a tag stays text.
    assert answers[0].query_selector("strong").inner_text() == "bold"
    assert len(answers[0].query_selector_all("li")) == 2
    assert "<img src=x" in answers[0].inner_text()
    assert "score 7.500" in answers[1].inner_text()

    page.click(".votes button:has-text('Right')")
    page.wait_for_selector(".voted")
    row = read_rows(str(folder / PREFERENCES), flag="--data_path", needs="rejected")[0]
    assert (row.chosen, row.rejected) == ("good day to you", HOSTILE)
    data = PairDataset([row], byte_tokenizer(), max_seq_len=512, prompt_format="auto")
    assert data[0]["chosen_ids"] != data[0]["rejected_ids"]

    # The conversation continues with the answer that won.
    send(page, "go on forever")
    page.wait_for_selector(".turn:nth-child(2) .answer:has-text('word word')")
    contents = [message["content"] for message in first.asked[-1]]
    assert contents == ["hello", "good day to you", "go on forever"]
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    wait_for(lambda: first.num_stopped == 1)
    assert "stopped" in page.query_selector_all(".answer")[2].inner_text()

    # A reload keeps the conversation; another message is answered at once.
    page.reload()
    page.wait_for_selector("#fields input", state="attached")
    assert len(page.query_selector_all(".turn")) == 2
    send(page, "again")
    page.wait_for_selector(".turn:nth-child(3) .votes")
    page.click(".turn:nth-child(3) .votes button:has-text('Both bad')")
    page.wait_for_selector(".turn:nth-child(3) .voted")
    undecided = json.loads((folder / UNDECIDED).read_text())
    assert undecided["vote"] == "bad" and len(undecided["answers"]) == 2


def test_clear_ends_the_answer_and_what_follows_is_a_new_conversation(scene):
    page, (first, _), _ = scene
    send(page, "go on forever")
    page.wait_for_selector(".answer:has-text('word word')")
    page.click("#clear")
    wait_for(lambda: first.num_stopped == 1)
    assert page.query_selector(".turn") is None
    send(page, "hello")
    page.wait_for_selector(".votes")
    assert [message["content"] for message in first.asked[-1]] == ["hello"]
    assert len(page.query_selector_all(".turn")) == 1


def test_input_methods_settings_retry_edit_and_theme(scene):
    page, (first, _), _ = scene
    page.fill("#message", "nihao")
    confirm = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    page.evaluate(f"document.getElementById('message').dispatchEvent({confirm})")
    assert page.query_selector(".turn") is None and page.input_value("#message") == "nihao"

    page.click("#options")
    page.fill("#system", "be short")
    page.fill("input[name=temperature]", "99")
    page.click("#send")
    page.wait_for_selector(".note:has-text('temperature is 99')")
    page.fill("input[name=temperature]", "0.5")
    page.click("button:has-text('Retry')")
    page.wait_for_selector(".votes")
    assert first.asked[-1][0] == {"role": "system", "content": "be short"}
    page.click("button:has-text('Edit')")
    assert page.input_value("#message") == "nihao"
    assert page.query_selector(".turn") is None

    page.click("#theme")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != back
