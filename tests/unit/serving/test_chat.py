"""The chat program on miniature models: encoding, ends of answers, the terminal, the server."""

import http.client
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch

from dschat.config.chat import ChatConfig
from dschat.config.parse import parse_config
from dschat.data.datasets import PromptDataset
from dschat.data.row import Row
from dschat.demo.tiny_models import byte_tokenizer, make_tiny_model
from dschat.models.causal_lm import load_causal_lm
from dschat.models.tokenizer import load_tokenizer
from dschat.serving.chat import Chat
from dschat.serving.chat_model import Answer, AnswerStreamer, ChatModel, Sampling
from dschat.serving.conversation import chat_format, fit_conversation, stop_texts
from dschat.serving.program import main, make_server
from dschat.serving.server import ChatServer
from dschat.serving.terminal import Terminal
from tests.unit.data_helpers import CHAT_TEMPLATE, make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
CHAT = ROOT / "inference" / "chat.py"
MESSAGES = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "three"},
]
FORMS = ("chat", "human_assistant", "plain")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "llama", family="llama", std=0.5))


def fit(messages, tokenizer, max_tokens=1000, prompt_format="chat"):
    return fit_conversation(messages, tokenizer, prompt_format=prompt_format, max_tokens=max_tokens)


def test_the_ids_are_those_of_the_chat_template():
    for tokenizer in (
        byte_tokenizer(add_bos=False),
        make_tokenizer(bos=True, chat_template=CHAT_TEMPLATE),
    ):
        ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        assert fit(MESSAGES, tokenizer) == (ids, 0)


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_the_ids_are_those_that_step_3_reads(template):
    tokenizer = make_tokenizer(bos=True, chat_template=template)
    rows = PromptDataset([Row(MESSAGES)], tokenizer, max_prompt_len=1000, prompt_format="auto")
    form = chat_format("auto", tokenizer)
    assert form == ("chat" if template else "human_assistant")
    assert fit(MESSAGES, tokenizer, prompt_format=form)[0] == rows[0]["input_ids"]


def test_plain_contents_are_joined_unchanged():
    tokenizer = make_tokenizer()
    ids, _ = fit(
        [{"role": "user", "content": "ab "}, {"role": "user", "content": "c"}],
        tokenizer,
        prompt_format="plain",
    )
    assert tokenizer.decode(ids) == "ab c"


@pytest.mark.parametrize("form", FORMS)
def test_the_oldest_turns_are_left_out_first_and_the_system_stays(form):
    tokenizer = byte_tokenizer()
    sizes = [
        len(fit([MESSAGES[0], *MESSAGES[begin:]], tokenizer, prompt_format=form)[0])
        for begin in (1, 3, 5)
    ]
    for number, size in enumerate(sizes):
        for room, left_out in ((size, 2 * number), (size - 1, 2 * (number + 1))):
            if left_out > 4:
                with pytest.raises(
                    ValueError,
                    match=f"has {size} tokens, and there is room for {room}: shorten it",
                ):
                    fit(MESSAGES, tokenizer, room, form)
                continue
            ids, found = fit(MESSAGES, tokenizer, room, form)
            assert (
                found == left_out
                and ids == fit([MESSAGES[0], *MESSAGES[1 + left_out :]], tokenizer, 1000, form)[0]
            )


def greedy(model, ids: list[int], number: int) -> list[int]:
    """Generate the likeliest tokens one by one, without generate()."""
    new: list[int] = []
    for _ in range(number):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_an_answer_ends_at_each_end_token_and_at_the_limit(family, tmp_path):
    path = str(make_tiny_model(tmp_path / family, family=family, std=0.5))
    tokenizer = load_tokenizer(path)
    ids, _ = fit(MESSAGES, tokenizer)
    new = greedy(load_causal_lm(path, dtype=torch.float32), ids, 15)
    assert len(set(new)) >= 8 and 2 not in new
    cut = ChatModel(load_causal_lm(path, dtype=torch.float32), tokenizer).answer(
        ids, max_new_tokens=15
    )
    assert (cut.text, cut.num_tokens, cut.ended) == (
        tokenizer.decode(new, skip_special_tokens=True),
        15,
        False,
    )
    letters = [i for i, token in enumerate(new) if i > 2 and new.index(token) == i]
    for place in letters[:2]:
        model = load_causal_lm(path, dtype=torch.float32)
        # The other settings would change the answer if they were used.
        model.generation_config.update(
            eos_token_id=[2, new[place]], do_sample=True, top_k=7, suppress_tokens=[new[0]]
        )
        shown: list[str] = []
        answer = ChatModel(model, tokenizer).answer(ids, max_new_tokens=15, show=shown.append)
        assert (answer.num_tokens, answer.ended) == (place + 1, True)
        # This end token has text: it is not a special token of the tokenizer.
        assert (
            answer.text
            == "".join(shown)
            == tokenizer.decode(new[: place + 1], skip_special_tokens=True)
        )


def test_the_end_token_is_not_shown(tmp_path):
    path = make_tiny_model(tmp_path / "llama", family="llama", std=0.5)
    model, tokenizer = load_causal_lm(str(path), dtype=torch.float32), load_tokenizer(str(path))
    ids, _ = fit(MESSAGES, tokenizer)
    new = greedy(model, ids, 4)
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # swap the end token with the fourth
        head[[2, new[3]]] = head[[new[3], 2]]
    assert new[3] not in new[:3]
    answer = ChatModel(model, tokenizer).answer(ids, max_new_tokens=16)
    assert (answer.text, answer.num_tokens, answer.ended) == (tokenizer.decode(new[:3]), 4, True)


def test_draws_follow_the_seed_and_the_settings(model_folder):
    tokenizer = load_tokenizer(model_folder)
    ids, _ = fit(MESSAGES, tokenizer)

    def drawn(seed: int, **settings) -> str:
        torch.manual_seed(seed)
        model = load_causal_lm(model_folder, dtype=torch.float32)
        model = ChatModel(model, tokenizer, sampling=Sampling(**settings))
        return model.answer(ids, max_new_tokens=60).text

    likeliest = drawn(0)
    assert drawn(0, temperature=5.0) == drawn(0, temperature=5.0) != drawn(1, temperature=5.0)
    assert drawn(0, temperature=5.0, top_k=1) == drawn(0, temperature=5.0, top_p=1e-6) == likeliest
    assert drawn(0, repetition_penalty=1e6) != likeliest


def test_the_beginning_of_a_user_turn_ends_an_answer_and_is_never_shown():
    text, mark = "yes\n\nno\n\nHuman\n\nHuman: more", "\n\nHuman:"
    for cut in range(len(text)):
        for other in range(cut, len(text)):
            shown: list[str] = []
            pieces = AnswerStreamer(byte_tokenizer(), stop_texts=(mark,), show=shown.append)
            for piece in (text[:cut], text[cut:other], text[other:]):
                pieces.add(piece)
            assert "".join(shown) == pieces.text == "yes\n\nno\n\nHuman" and pieces.stopped
    pieces = AnswerStreamer(byte_tokenizer(), stop_texts=(mark,), show=lambda piece: None)
    pieces.add("yes\n\nHum")
    assert pieces.text == "yes"
    pieces.add("", last=True)
    assert pieces.text == "yes\n\nHum" and not pieces.stopped
    assert [stop_texts(form) for form in FORMS] == [(), (mark,), ()]


def test_a_stop_text_ends_generation(model_folder):
    tokenizer = load_tokenizer(model_folder)
    model = ChatModel(load_causal_lm(model_folder, dtype=torch.float32), tokenizer)
    ids, _ = fit(MESSAGES, tokenizer)
    whole = model.answer(ids, max_new_tokens=300)
    place = next(
        i
        for i in range(100)
        if whole.text[i : i + 2].isascii() and whole.text[i : i + 2].isprintable()
    )
    answer = model.answer(
        ids, max_new_tokens=300, stop_texts=("never", whole.text[place : place + 2])
    )
    assert answer.ended and answer.num_tokens <= place + 40 < whole.num_tokens
    assert whole.text.startswith(answer.text + whole.text[place : place + 2])


def chat_config(model_folder: str, *words: str) -> ChatConfig:
    return parse_config(ChatConfig, ["--path", model_folder, "--max_new_tokens", "12", *words])


def test_the_terminal_answers_its_input(model_folder):
    argv = [sys.executable, str(CHAT), "--path", model_folder, "--max_new_tokens", "12"]
    lines = b"hello\n\nhello\n/clear\nhello\n\xff\nQUIT\nnever\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, input=lines, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    answers = re.findall(r"model: (.*?)(?: \[cut|\n)", done.stdout.decode())
    first, second, after_clear, _ = answers
    assert first == after_clear != second and len(set(first)) > 5
    assert done.stdout.decode().count("(a new conversation)") == 1
    tokenizer = load_tokenizer(model_folder)
    ids, _ = fit([{"role": "user", "content": "hello"}], tokenizer)
    text = (
        ChatModel(load_causal_lm(model_folder, dtype=torch.float32), tokenizer)
        .answer(ids, max_new_tokens=12)
        .text
    )
    assert first == re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


class FakeChat:
    """A Chat that answers with the number of messages it was given."""

    max_new_tokens = 4
    sampling = Sampling()

    def __init__(self):
        self.seen: list[list[str]] = []
        self.sampled: list[Sampling] = []

    def fit(self, messages):
        self.seen.append([message["content"] for message in messages])
        if messages[-1]["content"] == "long":
            raise ValueError("too long")
        return messages, 2 if len(messages) > 3 else 0

    def answer(self, ids, *, max_new_tokens, sampling, show):
        self.sampled.append(sampling)
        show(f" {len(ids)}\x1b[2J")
        if ids[-1]["content"] == "stop":
            raise KeyboardInterrupt
        return Answer("", 1, True)

    def as_turn(self, text):
        return text.strip()


def run_terminal(monkeypatch, capsys, lines: list[str], max_turns: int = 32):
    """Return the fake chat after a conversation of `lines`, and the output."""
    chat = FakeChat()
    left = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    Terminal(chat, max_turns=max_turns).talk()
    return chat, capsys.readouterr().out


def test_the_terminal_keeps_the_conversation(monkeypatch, capsys):
    chat, out = run_terminal(monkeypatch, capsys, ["a", "  ", "long", "b", "c", "clear", "d"])
    one, three = "1\x1b[2J", "3\x1b[2J"
    assert chat.seen == [
        ["a"],
        ["a", one, "long"],
        ["a", one, "b"],
        ["a", one, "b", three, "c"],
        ["d"],
    ]
    assert "(too long)" in out and "(2 older messages no longer fit and are left out)" in out
    assert "\x1b" not in out and "1\ufffd[2J" in out


def test_the_terminal_forgets_turns_and_continues_after_an_interrupt(monkeypatch, capsys):
    chat, out = run_terminal(monkeypatch, capsys, ["stop", "b", "c"], max_turns=1)
    assert chat.seen == [["stop"], ["stop", "1\x1b[2J", "b"], ["b", "3\x1b[2J", "c"]]
    assert out.count("[stopped]") == 1


def test_the_terminal_retries_and_takes_a_system_prompt_and_sampling(monkeypatch, capsys):
    lines = ["a", "/retry", "/system be short", "b", "/retry", "/sampling temperature 0.5", "c"]
    lines += ["/sampling", "/sampling top_p 2", "/sampling warmth 1", "/nothing", "/system", "d"]
    chat, out = run_terminal(monkeypatch, capsys, ["/retry", *lines])
    answer = "2\x1b[2J"
    assert chat.seen == [
        ["a"],
        ["a"],
        ["be short", "b"],
        ["be short", "b"],
        ["be short", "b", answer, "c"],
        ["d"],
    ]
    assert [sampling.temperature for sampling in chat.sampled] == [0, 0, 0, 0, 0.5, 0.5]
    for text in (
        "(nothing to answer again)",
        "temperature 0.5, top_k 0, top_p 1",
        "top_p is above 0 and at most 1",
        "no setting warmth",
        "(no command /nothing",
    ):
        assert text in out


def test_a_retry_that_cannot_be_answered_keeps_the_conversation(monkeypatch, capsys):
    chat = FakeChat()
    terminal = Terminal(chat, max_turns=3)
    assert terminal.reply("a")
    kept = list(terminal.turns)
    monkeypatch.setattr(chat, "fit", lambda messages: read_nothing())
    terminal.retry()
    assert terminal.turns == kept and "(no room)" in capsys.readouterr().out


def read_nothing():
    raise ValueError("no room")


def test_the_format_of_the_run_that_made_the_model_is_used(model_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(model_folder, folder / "actor")
    found = {}
    for recorded in (None, *FORMS):
        if recorded:
            (folder / "run.json").write_text(json.dumps({"text_format": recorded}))
        found[recorded] = Chat(chat_config(str(folder / "actor"))).format
    # Without a record, the tokenizer's template decides.
    assert found == {None: "chat", **{form: form for form in FORMS}}
    assert Chat(chat_config(str(folder / "actor"), "--prompt_format", "plain")).format == "plain"


def test_the_server_answers_as_the_terminal_does(model_folder):
    config = chat_config(model_folder, "--serve", "--port", "0", "--max_turns", "3")
    server = make_server(config)
    assert server.address[0] == "127.0.0.1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        found = [
            ask(server.address, {"messages": MESSAGES, **more})
            for more in ({}, {"max_new_tokens": 3})
        ]
        status, page = ask(server.address, None)
        long = ask(server.address, {"messages": [{"role": "user", "content": "x" * 2000}]})
    finally:
        server.stop()
        thread.join()
    chat = Chat(config)
    ids, _ = chat.fit(MESSAGES)
    answer = chat.answer(ids, max_new_tokens=12)
    assert found[0] == (
        200,
        {"text": answer.text.strip(), "num_tokens": 12, "ended": False, "left_out": 0},
    )
    assert found[1][1]["num_tokens"] == 3
    assert (
        status == 200
        and "textContent" in page
        and not re.search(r"innerHTML|outerHTML|document\.write|https?:", page)
    )
    # Of the 512 positions 12 are the answer's.
    assert long[0] == 400 and "there is room for 500" in long[1]["error"]


def ask(address: tuple[str, int], body: dict | None) -> tuple[int, dict | str]:
    connection = http.client.HTTPConnection(*address, timeout=30)
    if body is None:
        connection.request("GET", "/")
    else:
        connection.request("POST", "/chat", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text if body is None else json.loads(text)


def test_the_served_program_prints_its_address_and_ends_by_a_signal(model_folder):
    argv = [sys.executable, str(CHAT), "--path", model_folder, "--serve", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends\)\n", line)[1])
            address, request = ("127.0.0.1", port), {"messages": MESSAGES}
            status, answer = ask(address, {**request, "max_new_tokens": 2})
            assert (status, answer["num_tokens"]) == (200, 2)
            with ThreadPoolExecutor(5) as pool:
                # One has its answer, the next is in progress, and the others wait for their turn.
                asked = [pool.submit(ask, address, request) for _ in range(5)]
                wait(asked, return_when=FIRST_COMPLETED)
                process.send_signal(signal.SIGINT)
                assert process.wait(30) == 0, process.stderr.read()
                found = sorted(future.result()[0] for future in asked)
            assert (found[0], found[-1]) == (200, 503)
        finally:
            process.kill()


@pytest.mark.parametrize("host, warned", [("0.0.0.0", True), ("127.0.0.1", False)])
def test_an_address_open_to_others_is_warned_of_at_the_start(
    host, warned, model_folder, monkeypatch, caplog
):
    argv = ["chat.py", "--path", model_folder, "--serve", "--host", host, "--port", "0"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(ChatServer, "serve_forever", lambda self: self.socket.close())
    monkeypatch.setattr(logging.getLogger("dschat"), "propagate", True)
    main()
    warning = f"warning: other machines can reach --host {host}"
    assert [line.startswith(warning) for line in caplog.messages] == [True] * warned


# Arguments, and what the message must contain.
BAD_FLAGS = {
    "no model": ([], ["--path is required"]),
    "numbers": (
        "--path m --max_new_tokens 0 --temperature -1 --top_p 0 --max_turns 0 --port 70000".split(),
        [
            "--max_new_tokens 0",
            "--temperature -1.0",
            "--top_p 0.0",
            "--max_turns 0",
            "--port 70000",
        ],
    ),
    "limits": (
        "--path m --max_request_bytes 0 --requests_per_minute 0 --max_wait_s -1".split(),
        ["--max_request_bytes 0", "--requests_per_minute 0", "--max_wait_s -1.0"],
    ),
    "no folder": (["--path", "./nowhere"], ["--path './nowhere' does not exist"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_wrong_flag_is_named(case):
    argv, words = BAD_FLAGS[case]
    with pytest.raises(ValueError) as error:
        Chat(parse_config(ChatConfig, argv))
    assert [word for word in words if word not in str(error.value)] == []


def test_an_answer_longer_than_the_positions_is_refused(model_folder):
    with pytest.raises(ValueError, match="--max_new_tokens 512: the model has 512 positions"):
        Chat(chat_config(model_folder, "--max_new_tokens", "512"))


def test_flags_without_effect_say_so(model_folder):
    assert chat_config(model_folder).without_effect() == []
    words = "--top_k 5 --top_p 0.5 --host 0.0.0.0".split()
    assert chat_config(model_folder, *words).without_effect() == [
        "--top_k 5 has no effect at --temperature 0",
        "--top_p 0.5 has no effect at --temperature 0",
        "--host 0.0.0.0 has no effect without --serve",
    ]
    assert chat_config(model_folder, *words, "--temperature", "1", "--serve").without_effect() == []


def test_the_readme_names_every_flag():
    text = (ROOT / "inference" / "README.md").read_text(encoding="utf-8")
    options = parse_config(ChatConfig, ["--path", "m"])
    names = [name for group in vars(options).values() for name in vars(group)]
    assert [name for name in names if f"`--{name}`" not in text] == []
