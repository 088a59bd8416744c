"""Rows in the forms that people's data has, each through the public door."""

import json

import pytest

from dschat.config.sft import SFTData
from dschat.data.blends import open_blends
from dschat.data.forms import FORMS, Reading, find_form, read_row, read_rows
from dschat.data.loaders import build_pair_data, build_prompt_data, build_sft_data
from dschat.data.readers import BARE_TEXT
from tests.unit.data_helpers import EOS, make_tokenizer, write_lines

USER = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}
FIRST = {"role": "assistant", "content": "a1"}
MORE = {"role": "user", "content": "more"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
HH = "\n\nHuman: q\n\nAssistant: a1\n\nHuman: more\n\nAssistant:"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def conversation(*turns):
    return [{"from": name, "value": text} for name, text in turns]


# name: (form, raw row, prompt, chosen, rejected)
ROWS = {
    "pairs of texts": (
        "prompt",
        {"prompt": "q", "chosen": " good", "rejected": " bad"},
        ("q", " good", " bad"),
    ),
    "pairs of messages": (
        "prompt",
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        ([USER], "good", "bad"),
    ),
    "UltraFeedback": (
        "dialogue pair",
        {
            "prompt": "q",
            "prompt_id": "1",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, GOOD],
            "score_chosen": 7.0,
            "score_rejected": 2.0,
        },
        ([USER], "good", "bad"),
    ),
    "whole dialogues": (
        "dialogue pair",
        {"chosen": [USER, FIRST, MORE, GOOD], "rejected": [USER, FIRST, MORE, BAD]},
        ([USER, FIRST, MORE], "good", "bad"),
    ),
    "dialogues that part early": (
        "dialogue pair",
        {"chosen": [USER, FIRST, MORE, GOOD], "rejected": [USER, BAD]},
        ([USER], [FIRST, MORE, GOOD], "bad"),
    ),
    "transcripts": (
        "transcript pair",
        {"chosen": HH + " good", "rejected": HH + " bad"},
        (HH, " good", " bad"),
    ),
    "messages": ("messages", {"messages": [SYSTEM, USER, GOOD]}, ([SYSTEM, USER], "good", None)),
    "messages and answers": (
        "messages",
        {"messages": [USER], "chosen": "good", "rejected": "bad"},
        ([USER], "good", "bad"),
    ),
    "UltraChat": (
        "messages",
        {"prompt": "q", "prompt_id": "1", "messages": [USER, GOOD]},
        ([USER], "good", None),
    ),
    "developer": (
        "messages",
        {"messages": [{"role": "developer", "content": "s"}, USER, GOOD]},
        ([SYSTEM, USER], "good", None),
    ),
    "ShareGPT": (
        "messages",
        {"conversations": conversation(("human", "q"), ("gpt", "good")), "system": "s"},
        ([SYSTEM, USER], "good", None),
    ),
    "ShareGPT ranked": (
        "messages",
        {
            "conversations": conversation(("human", "q")),
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        ([USER], "good", "bad"),
    ),
    "content parts": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "good"}]},
            ]
        },
        ([USER], "good", None),
    ),
    "prompt and completion": (
        "prompt",
        {"prompt": "q", "completion": " good"},
        ("q", " good", None),
    ),
    "prompt and completion as messages": (
        "prompt",
        {"prompt": [USER], "completion": [GOOD]},
        ([USER], "good", None),
    ),
    "unpaired, good": (
        "prompt",
        {"prompt": "q", "completion": " good", "label": True},
        ("q", " good", None),
    ),
    "unpaired, bad": (
        "prompt",
        {"prompt": "q", "completion": " bad", "label": False},
        ("q", None, None),
    ),
    "Alpaca": (
        "instruction",
        {"instruction": "q", "input": "", "output": "good"},
        ([USER], "good", None),
    ),
    "Alpaca with input": (
        "instruction",
        {"instruction": "q", "input": "i", "output": "good"},
        ([{"role": "user", "content": "q\n\ni"}], "good", None),
    ),
    "Dolly": (
        "instruction",
        {"instruction": "q", "context": "c", "response": "good", "category": "x"},
        ([{"role": "user", "content": "q\n\nc"}], "good", None),
    ),
    "system column": (
        "prompt",
        {"system": "s", "prompt": "q", "chosen": " good", "rejected": " bad"},
        ([SYSTEM, USER], " good", " bad"),
    ),
    "Orca": (
        "question",
        {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
        ([SYSTEM, USER], "good", "bad"),
    ),
    "input with a system prompt": (
        "question",
        {"system": "s", "input": "q", "chosen": "good", "rejected": "bad", "rating": [9, 8]},
        ([SYSTEM, USER], "good", "bad"),
    ),
    "input and output": ("question", {"input": "q", "output": "good"}, ([USER], "good", None)),
    "input of messages": ("question", {"input": [USER], "ideal": "x"}, ([USER], None, None)),
    "text with an input": ("text", {"text": "q", "input": ""}, ("", "q", None)),
    "GSM8K": ("question", {"question": "q", "answer": "good"}, ([USER], "good", None)),
    "MATH": ("question", {"problem": "q", "solution": "good", "level": 3}, ([USER], "good", None)),
    "a number": ("prompt", {"prompt": "q", "chosen": 0}, ("q", "0", None)),
    "text": ("text", {"text": "all of it"}, ("", "all of it", None)),
    "line of text": ("line of text", {BARE_TEXT: "all of it"}, ("", "all of it", None)),
    "summaries": (
        "summaries",
        {
            "info": {"post": "q", "title": "t"},
            "summaries": [{"text": " bad"}, {"text": " good"}],
            "choice": 1,
        },
        ("t\n\nq\n\nTL;DR:", " good", " bad"),
    ),
    "WebGPT": (
        "scored answers",
        {
            "question": {"full_text": "q"},
            "answer_0": "bad [1]",
            "answer_1": "good [2, 3]",
            "score_0": -1.0,
            "score_1": 1.0,
        },
        ([USER], "good", "bad"),
    ),
    "SHP": (
        "two answers",
        {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0},
        ([USER], "good", "bad"),
    ),
    "SafeRLHF": (
        "two answers",
        {"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1},
        ([USER], "good", "bad"),
    ),
    "HelpSteer3": (
        "two answers",
        {"context": [USER], "response1": "good", "response2": "bad", "overall_preference": -2},
        ([USER], "good", "bad"),
    ),
    "arena": (
        "two answers",
        {"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD], "winner": "model_b"},
        ([USER], "good", "bad"),
    ),
    "arena, a tie": (
        "two answers",
        {"conversation_a": [USER, GOOD], "conversation_b": [USER, BAD], "winner": "tie"},
        ([USER], "good", None),
    ),
    "Nectar": (
        "ranked answers",
        {
            "prompt": HH,
            "answers": [
                {"answer": "bad", "rank": 3.0},
                {"answer": "good", "rank": 1.0},
                {"answer": "fair", "rank": 2.0},
            ],
        },
        (HH, "good", "bad"),
    ),
    "scores beside": (
        "ranked answers",
        {"prompt": "q", "completions": ["bad", "good"], "scores": [0.1, 0.9]},
        ([USER], "good", "bad"),
    ),
    "UltraFeedback, all answers": (
        "ranked answers",
        {
            "instruction": "q",
            "completions": [
                {"response": "good", "overall_score": "8.5"},
                {"response": "bad", "overall_score": 2},
            ],
        },
        ([USER], "good", "bad"),
    ),
    "OpenAssistant": (
        "OpenAssistant tree",
        {
            "prompt": {
                "text": "q",
                "role": "prompter",
                "replies": [
                    {"text": "good", "role": "assistant", "rank": 0, "replies": []},
                    {"text": "bad", "role": "assistant", "rank": 1, "replies": []},
                ],
            }
        },
        ([USER], "good", "bad"),
    ),
    "a reward's answer": ("prompt", {"prompt": "q", "answers": {"text": ["x"]}}, ("q", None, None)),
}


@pytest.mark.parametrize("name", ROWS)
def test_form(name):
    form, raw, texts = ROWS[name]
    assert find_form(raw).name == form
    row = read_row(raw)
    assert (row.prompt, row.chosen, row.rejected) == texts


def test_every_form_is_tested():
    assert {form for form, _, _ in ROWS.values()} == {form.name for form in FORMS}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSCHAT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ROWS)
def test_form_in_every_step(name, tmp_path, cache):
    """Each step uses what the row has, or says which text it lacks."""
    _, raw, (prompt, chosen, rejected) = ROWS[name]
    # Other beginnings, so that some can be held out.
    is_line = name == "line of text"
    text = json.dumps(raw[BARE_TEXT] if is_line else raw)
    for old in ('"q"', "Human: q", "all of it"):
        text = text.replace(old, old.replace("q", "q{}").replace("it", "it{}"))
    path = write_lines(tmp_path / "rows.jsonl", [text.replace("{}", str(i)) for i in range(20)])
    tokenizer = make_tokenizer()
    data = SFTData(data_path=[path], data_split="1,0,0", eval_fraction=0.2, max_seq_len=200)
    builders = {
        "chosen": lambda: build_sft_data(data, tokenizer, end_token_id=EOS),
        "rejected": lambda: build_pair_data(
            SFTData(**{**vars(data), "data_split": "0,1,0"}), tokenizer, end_token_id=EOS
        ),
        "prompt": lambda: build_prompt_data(
            SFTData(**{**vars(data), "data_split": "0,0,1"}), tokenizer, max_prompt_len=200
        ),
    }
    has = {
        "chosen": chosen is not None,
        "rejected": rejected is not None,
        "prompt": bool(prompt) or is_line,
    }
    for needs, build in builders.items():
        if has[needs]:
            train, held_out = build()
            assert (len(train), len(held_out)) == (16, 4)
            assert train[0] and held_out[3]
        else:
            with pytest.raises(ValueError, match=f'no "{needs}", which step'):
                build()


def test_fields_that_carry_meaning():
    row = read_row({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.5, "source": "x"})
    assert row.margin == 1.5 and row.columns == {"source": "x"}
    arguments = json.dumps({"x": 1})
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": {}}]}
    call["tool_calls"][0]["function"] = {"name": "f", "arguments": arguments}
    result = {"role": "tool", "tool_call_id": "c1", "content": "4"}
    row = read_row({"messages": [USER, call, result, GOOD], "tools": TOOLS})
    assert row.tools == TOOLS and row.chosen == "good"
    assert row.prompt[1]["tool_calls"] == [{**CALL, "id": "c1"}]
    assert row.prompt[2] == result
    assert read_row({"messages": [USER, call], "tools": json.dumps(TOOLS)}).tools == TOOLS
    assert read_row({"messages": [USER, call]}).chosen[0]["tool_calls"][0]["id"] == "c1"
    thinks = {**GOOD, "reasoning_content": "hm"}
    assert read_row({"messages": [USER, thinks]}).chosen == [thinks]
    silent = {**FIRST, "weight": 0}
    assert read_row({"messages": [USER, silent, MORE, GOOD]}).prompt[1] == {**FIRST, "learn": False}


@pytest.mark.parametrize(
    "raw, words",
    [
        ({"messages": [USER, {"role": "assistant", "content": None}]}, 'content" is null'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, GOOD]},
            'is "image_url", and only parts of type text',
        ),
        ({"messages": [USER, {**GOOD, "weight": 0.5}]}, "weight is 0.5; a turn's weight is 0 or 1"),
        ({"messages": [SYSTEM, USER, GOOD], "system": "other"}, "begin with another one"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"}, '"margin" is "x"'),
        ({"messages": [USER, GOOD], "tools": "{"}, '"tools" is "{", not JSON'),
        ({"chosen": "a", "rejected": "b"}, "without a prompt"),
        ({"chosen": [USER, GOOD], "rejected": [MORE, BAD]}, "no prompt in common"),
        ({"prompt": [USER], "chosen": [USER]}, '"chosen" does not end with an answer'),
        ({"prompt": "q", "completions": ["a", "b"], "scores": ["x", "y"]}, "no rank and no score"),
        ({"question": "", "answer": "a"}, 'field "question" is empty'),
    ],
)
def test_rows_that_are_refused(raw, words):
    with pytest.raises(ValueError) as caught:
        read_rows(raw)
    assert words in str(caught.value)


def test_columns_by_name():
    reading = Reading(columns={"prompt": "info.ask", "chosen": "yes", "rejected": "no"})
    raw = {"info": {"ask": "q"}, "yes": "good", "no": "bad", "prompt": "other", "kept": 1}
    row = read_row(raw, reading)
    assert (row.prompt, row.chosen, row.rejected, row.columns) == ("q", "good", "bad", {"kept": 1})
    with pytest.raises(ValueError, match='no field "yes", which --chosen_key names'):
        read_row({"info": {"ask": "q"}}, reading)


RANKED = {
    "prompt": "q",
    "completions": ["b", "a", "d", "c", "e"],
    "scores": [3, 4, 1, 2, 1],
}


@pytest.mark.parametrize(
    "rule, pairs",
    [
        ("best_worst", ["ae"]),
        ("adjacent", ["ab", "bc", "cd"]),
        ("all", ["ab", "ac", "ad", "ae", "bc", "bd", "be", "cd", "ce"]),
    ],
)
def test_pairs_of_ranked_answers(rule, pairs):
    """Ranks come from scores; d and e are equal and make no pair."""
    rows = read_rows(RANKED, Reading(pairs=rule))
    assert [row.chosen + row.rejected for row in rows] == pairs


def test_min_margin():
    rows = read_rows(RANKED, Reading(pairs="all", min_margin=2))
    assert [row.chosen + row.rejected for row in rows] == ["ac", "ad", "ae", "bd", "be"]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for extra, kept in (
        ({"margin": 1.9}, False),
        ({"margin": 2}, True),
        ({"score_chosen": 5, "score_rejected": 4}, False),
        ({}, True),
    ):
        assert bool(read_rows({**pair, **extra}, Reading(min_margin=2))) == kept


def test_a_blend_of_five_forms(tmp_path, cache):
    names = ("pairs of texts", "UltraFeedback", "transcripts", "Orca", "Nectar")
    paths = []
    for number, name in enumerate(names):
        text = json.dumps(ROWS[name][1]).replace('"q"', '"q{}"').replace("Human: q", "Human: q{}")
        lines = [text.replace("{}", f"{number}-{i}") for i in range(20)]
        paths.append(write_lines(tmp_path / f"{number}.jsonl", lines))
    data = SFTData(data_path=paths, data_split="1,1,2", eval_fraction=0.2, max_seq_len=300)
    counts = [len(open_blends(data, step=step, needs="rejected")[0]) for step in (1, 2, 3)]
    assert sum(counts) == 80 and counts[2] == 40
    train, held_out = build_pair_data(data, make_tokenizer(), end_token_id=EOS)
    assert len(train) == counts[1]
    assert {train.row(i).place.split(",")[0] for i in range(len(train))} == set(paths)
    assert all(train[i]["chosen_ids"] != train[i]["rejected_ids"] for i in range(len(train)))
