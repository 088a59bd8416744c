"""Rows and files of extreme shapes take time that grows with their size, not with its square."""

import contextlib
import json
import signal

import pytest

from dschat.data import templates
from dschat.data.datasets import LeftOut, PairDataset, SFTDataset
from dschat.data.encoding import Encoder
from dschat.data.forms import read_row
from dschat.data.readers import MAX_DEPTH
from dschat.data.sources import load_source
from tests.unit.data_helpers import CHAT_TEMPLATE, make_tokenizer

LIMIT_S = 20
TOKENIZER = make_tokenizer(chat_template=CHAT_TEMPLATE)


@contextlib.contextmanager
def limited_time():
    """Fail if the context takes more than LIMIT_S seconds; most cases take less than one."""

    def fail(*_):
        pytest.fail(f"not done after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def conversation(num_messages: int) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": "ab"} for i in range(num_messages)]}


def transcript(num_turns: int) -> dict:
    prompt = "\n\nHuman: a\n\nAssistant: b" * num_turns + "\n\nHuman: a\n\nAssistant:"
    return {"prompt": prompt, "chosen": " x", "rejected": " y"}


ROWS = {
    "messages": conversation(10_000),
    "transcript": transcript(10_000),
    "pair of messages": {
        "chosen": conversation(10_000)["messages"],
        "rejected": [*conversation(9_999)["messages"], {"role": "assistant", "content": "c"}],
    },
    "calls": {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "b",
                "tool_calls": [{"function": {"name": "f", "arguments": {}}}] * 20_000,
            },
        ]
    },
}


@pytest.mark.parametrize("prompt_format", ["human_assistant", "chat"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_very_many_turns_is_cut_or_named_in_seconds(name, prompt_format):
    with limited_time():
        row = read_row(ROWS[name])
        options = dict(max_seq_len=16, end_token_id=2, prompt_format=prompt_format)
        for kind in (SFTDataset, PairDataset) if row.rejected else (SFTDataset,):
            with contextlib.suppress(LeftOut, ValueError):
                kind([row], TOKENIZER, **options)[0]


def test_the_longest_conversation_whose_answers_are_all_learned(monkeypatch):
    monkeypatch.setattr(templates, "MAX_MESSAGES", 100)
    encoder = Encoder(TOKENIZER, prompt_format="chat")
    most = read_row(conversation(100))  # the last answer is no part of the prompt
    assert len(encoder.encode(most, with_turns=True).turns) == 49
    more = read_row(conversation(102))
    with pytest.raises(ValueError, match="a row: it has 101 messages.*--train_on last"):
        encoder.encode(more, with_turns=True)
    assert encoder.encode(more).chosen


def test_each_turn_begins_and_ends_at_its_tokens():
    encoder = Encoder(TOKENIZER, prompt_format="human_assistant")
    encoded = encoder.encode(read_row(conversation(6)), with_turns=True)
    turns = [TOKENIZER.decode(encoded.prompt[begin:end]) for begin, end in encoded.turns]
    assert turns == [" ab", " ab"]


HEADERS = {
    "repeated names": (b",".join(b"c%d" % (i % 7) for i in range(1_000_000)), "and 2 others"),
    "different names": (b",".join(b"c%d" % i for i in range(300_000)), "under a header of 300000"),
    "one name": (b"x" * 10_000_000, "under a header of 1"),
    "an open quote": (b'"' + b"\n" * 1_000_000, "not readable as CSV"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_line_of_megabytes_is_refused_in_seconds(name, tmp_path):
    header, words = HEADERS[name]
    path = tmp_path / "rows.csv"
    path.write_bytes(header + b"\na,b\n")
    with limited_time(), pytest.raises(ValueError, match=words) as error:
        load_source(str(path))
    assert "rows.csv, line" in str(error.value) and len(str(error.value)) < 1000


NESTED = {
    "a column": '{"prompt": "a", "chosen": "b", "x": NESTED}',
    "a prompt": '{"prompt": NESTED, "chosen": "b"}',
    "tools": '{"prompt": "a", "chosen": "b", "tools": "NESTED"}',
    "arguments": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", '
        '"tool_calls": [{"function": {"name": "f", "arguments": NESTED}}]}]}'
    ),
    "arguments as text": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", '
        '"tool_calls": [{"function": {"name": "f", "arguments": "NESTED"}}]}]}'
    ),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", NESTED)
def test_rows_of_any_depth_are_read_or_named_in_an_error(name, suffix, tmp_path):
    good = json.dumps({"prompt": "a", "chosen": "b"})
    path = tmp_path / f"rows.{suffix}"
    # Some interpreters call functions at most 1000 levels deep, those of this test included.
    for depth in (MAX_DEPTH // 2, MAX_DEPTH, *range(860, 1000, 10), 100_000):
        row = NESTED[name].replace("NESTED", "[" * depth + "]" * depth)
        lines = [row, good]
        path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
        try:
            load_source(str(path))
        except ValueError as error:
            assert f"rows.{suffix}, line 1: " in str(error)


def test_a_row_of_the_largest_depth_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    for depth, num_rows in ((MAX_DEPTH - 1, 2), (MAX_DEPTH, 1)):
        row = NESTED["a column"].replace("NESTED", "[" * depth + "]" * depth)
        path.write_text(row + '\n{"prompt": "a", "chosen": "b"}\n')
        assert len(load_source(str(path), skip_bad_rows=True).train) == num_rows
