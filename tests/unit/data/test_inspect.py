"""Inspection of the data of each step."""

import json
import logging
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat.config.parse import parse_config
from dschat.data import inspect
from dschat.data.datasets import PairDataset, PromptDataset, SFTDataset
from dschat.data.forms import Reading
from dschat.data.preparation import prepare
from dschat.data.row import Row
from dschat.data.sources import load_source
from dschat.data.survey import survey_columns, survey_rows
from tests.unit.data.test_bad_input_properties import FIELDS
from tests.unit.data_helpers import CHAT_TEMPLATE, make_tokenizer, pairs, write_lines

LEARNED = "\033[32m"
REJECTED = "\033[31m"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def model(tmp_path):
    make_tokenizer(chat_template=CHAT_TEMPLATE, special=["</>"]).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def show(tmp_path, model, capsys):
    """Return a function that inspects rows, and returns what is printed."""

    def show(rows, *words):
        path = write_lines(tmp_path / "rows.jsonl", rows)
        inspect.main(["--data_path", path, "--model", model, "--eval_fraction", "0.2", *words])
        return capsys.readouterr().out

    return show


def folder(tmp_path):
    write_lines(tmp_path / "set" / "train.jsonl", pairs(20))
    write_lines(tmp_path / "set" / "eval.jsonl", pairs(10, 20))
    return str(tmp_path / "set")


def chats(num_rows):
    """Return conversations of two turns each."""
    rows = []
    for number in range(num_rows):
        turns = [f"q{number}", "FIRST", "more", "SECOND"]
        messages = [
            {"role": role, "content": text}
            for role, text in zip(["user", "assistant"] * 2, turns, strict=True)
        ]
        rows.append({"messages": messages, "id": number})
    return rows


def test_every_step(tmp_path, model, capsys):
    words = ["--data_path", folder(tmp_path), "--model", model, "--num_shown", "1"]
    inspect.main([*words, "--prompt_format", "chat"])
    shown = capsys.readouterr().out
    assert "step 1, supervised fine-tuning: 4 rows to train on, 2 held out" in shown
    assert "step 2, reward model and DPO: 8" in shown
    assert "step 3, PPO: 8" in shown
    for words_shown in ("train.jsonl, line ", "<user>p", " tokens"):
        assert words_shown in shown
    inspect.main([*words, "--data_split", "1,0,0"])
    assert "step 3, PPO: nothing to read: --data_split 1,0,0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--data_path /no/file.jsonl"):
        inspect.main(["--data_path", "/no/file.jsonl", *words[2:]])


def test_one_step(show):
    shown = show(pairs(20), "--step", "2", "--data_split", "0,1,0")
    assert "step 2, reward model and DPO: 16 rows to train on, 4 held out" in shown
    assert "step 1" not in shown and "step 3" not in shown


def test_the_same_tokenizers_as_the_steps(tmp_path, capsys):
    words = ["--data_path", folder(tmp_path), "--model"]
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    inspect.main([*words, str(tmp_path / "adapter")])
    assert "step 3, PPO: 8" in capsys.readouterr().out
    inspect.main([*words, str(tmp_path / "base"), "--add_eot_token", "--eot_token", "<end>"])
    shown = capsys.readouterr().out
    assert "<end>»" in shown and "an answer ends with <end>" in shown
    with pytest.raises(ValueError, match="^--model '/nonexistent' does not exist"):
        inspect.main([*words, "/nonexistent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="^--model '.*empty' holds no tokenizer"):
        inspect.main([*words, str(tmp_path / "empty")])


@pytest.mark.parametrize(
    "train_on, text",
    [
        ("all_assistant", "<user>q{}</><assistant>«FIRST</>»<user>more</><assistant>«SECOND</>»"),
        ("last", "<user>q{}</><assistant>FIRST</><user>more</><assistant>«SECOND</>»"),
        ("all", "«<user>q{}</><assistant>FIRST</><user>more</><assistant>SECOND</>»"),
    ],
)
def test_what_is_learned_stands_between_marks(show, train_on, text):
    shown = show(chats(20), "--step", "1", "--data_split", "1,0,0", "--train_on", train_on)
    number = shown.split("rows.jsonl, line ")[1].split(":")[0]
    # A causal model predicts nothing for the first token, here <s>.
    assert "<s>" + text.format(int(number) - 1) in shown
    assert "messages (20 rows)" in shown
    assert "used: messages (20)\n               not used: id (20)" in shown
    assert "chat; an answer ends with </>" in shown


def test_share_of_learned_tokens(show):
    """A row has 2 + 2 or 3 tokens of prompt, and 6 or 7 of answer with its end."""
    rows = [{"prompt": f"p{i}", "chosen": "four"} for i in range(10, 30)]
    shown = show(rows, "--step", "1", "--data_split", "1,0,0")
    assert "learned    80 of 128 tokens (62.5%)" in shown
    assert "tokens     median 8, 95% up to 8, longest 8; --max_seq_len is 512" in shown
    assert "held out   4 of 4 rows" in shown


@pytest.mark.parametrize("step, limit", [(1, "--max_seq_len"), (3, "--max_prompt_seq_len")])
def test_rows_that_are_cut_or_left_out(show, step, limit):
    rows = [{"prompt": "p" * (i + 1), "chosen": "a"} for i in range(40)]
    split = {1: "1,0,0", 3: "0,0,1"}[step]
    words = ("--step", str(step), "--data_split", split, limit, "30")
    shown = show(rows, *words)
    reason = {1: "has no room for an answer", 3: ""}[step]
    assert f"{limit} 30" in shown.split("left out")[1].split("\n")[0] and reason in shown
    shown = show(rows, *words, "--truncation", "share", "--num_shown", "100")
    assert "left out" not in shown.split("held out  ")[0]
    assert "cut " in shown and ", cut from " in shown


def test_pairs_show_both_answers_and_the_margin(show):
    rows = [{**pair, "margin": 1.5, "source": "x"} for pair in pairs(20)]
    shown = show(rows, "--step", "2", "--data_split", "0,1,0", "--num_shown", "1")
    assert "chosen:\n        « good" in shown
    assert "rejected:\n        « bad" in shown
    assert "</s>»" in shown and "margin: 1.5" in shown
    assert "used: chosen (20), margin (20), prompt (20), rejected (20)" in shown
    assert "not used: source (20)" in shown


def test_prompts_show_what_a_reward_function_gets(show):
    rows = [{**pair, "gold": 4} for pair in pairs(20)]
    shown = show(rows, "--step", "3", "--data_split", "0,0,1", "--num_shown", "1")
    assert "used: prompt (20)" in shown
    assert "for --reward_fn: gold (20)" in shown
    assert "not used: chosen (20), rejected (20)" in shown
    assert "prompt:\n        p" in shown and "«" not in shown


def test_colors(show, monkeypatch):
    words = ("--step", "2", "--data_split", "0,1,0", "--num_shown", "1", "--color")
    shown = show(pairs(20), *words, "always")
    assert f"{LEARNED} good" in shown and f"{REJECTED} bad" in shown and "«" not in shown
    assert LEARNED not in show(pairs(20), *words, "never")
    assert LEARNED not in show(pairs(20), *words, "auto")  # no terminal
    monkeypatch.setattr(inspect.sys.stdout, "isatty", lambda: True, raising=False)
    assert inspect._use_color("auto")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not inspect._use_color("auto")


def test_texts_do_not_change_the_terminal(show):
    rows = [{"prompt": f"p{i}\033[2J\n", "chosen": " a\tb\nc"} for i in range(20)]
    shown = show(rows, "--step", "1", "--data_split", "1,0,0", "--color", "always")
    assert r"\x1b[2J" in shown and "\033[2J" not in shown
    # A colour ends with its line.
    assert f"{LEARNED} a\\tb\033[0m\n        {LEARNED}c</s>\033[0m\n" in shown


BAD = [
    ("{broken", "not readable as JSON"),
    ({"prompt": "q", "chosen": ""}, 'field "chosen" is empty'),
    ({"foo": 1}, 'no field "prompt" or "messages"'),
]


def test_bad_rows_are_listed_once(show, tmp_path, model, capsys, caplog):
    rows = [*pairs(30), *(row for row, _ in BAD)]
    with pytest.raises(ValueError, match="Fix the rows"):
        show(rows)
    shown = capsys.readouterr().out
    assert shown.count("3 of 33 rows cannot be read:") == 1
    assert shown.count("3 of 33 rows cannot be read, see step 1") == 2
    for line, (_, reason) in enumerate(BAD, start=31):
        assert shown.count(f"line {line}: {reason}") == 1
    assert "step 2 would stop at bad rows. Fix the rows, or leave them out" in shown
    assert "rows.jsonl, line 1: " not in shown.split("step 2,")[0].split("bad rows")[0]
    shown = show(rows, "--skip_bad_rows", "true")
    assert "3 of 33 rows cannot be read:" in shown and "would stop" not in shown
    many = [*pairs(30), *({"foo": i} for i in range(40))]
    with pytest.raises(ValueError):
        show(many)
    assert "... and 30 more." in capsys.readouterr().out
    with pytest.raises(ValueError, match="No row here is usable"):
        show([{"foo": 1}])


def test_rows_that_lack_the_text_of_a_step(show, caplog):
    rows = [*pairs(20), *({"prompt": f"q{i}", "chosen": " c"} for i in range(20))]
    with caplog.at_level(logging.WARNING):
        shown = show(rows)
    assert 'lacking    20 of its 40 rows in all steps have no "rejected"' in shown
    assert "step 2 would stop: " in shown and 'no "rejected", which step 2 needs' in shown
    assert "step 1 would stop" not in shown and "step 3 would stop" not in shown
    assert not caplog.records


def test_rows_that_cannot_be_shown(show, capsys):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = [*chats(20), {**chats(30)[-1], "tools": tools}]
    words = ("--step", "1", "--data_split", "1,0,0", "--eval_fraction", "0.1")
    with pytest.raises(ValueError, match="1 rows of the .* data cannot be shown"):
        show(rows, *words)
    shown = capsys.readouterr().out
    assert "1 rows cannot be shown:" in shown
    assert "line 21: it has a field tools, and the tokenizer's chat template" in shown
    assert "would stop" not in show(rows, *words, "--skip_bad_rows", "true")


def test_a_part_without_rows(show, capsys):
    with pytest.raises(ValueError, match="no row of the training data is left"):
        show(pairs(20), "--step", "1", "--data_split", "1,0,0", "--max_seq_len", "2")
    assert "step 1 would stop: no row of the training data is left" in capsys.readouterr().out


def test_weights_of_a_blend(show, capsys):
    words = ("--step", "1", "--data_split", "1,0,0", "--blend")
    assert "rows.jsonl: 16 rows, 1.00 passes over its 16" in show(pairs(20), *words, "2")
    with pytest.raises(ValueError, match="--blend has 2 weights"):
        show(pairs(20), *words, "2", "1")
    assert "step 1 would stop: --blend has 2 weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--step", "4"], "--step 4: give 1, 2 or 3"),
        (["--num_shown", "-1"], "--num_shown -1"),
        (["--max_seq_len", "1"], "--max_seq_len 1"),
        (["--color", "red"], "--color"),
        (["--blend_temperature", "0"], "--blend_temperature 0"),
    ],
)
def test_wrong_options(words, message):
    with pytest.raises(ValueError, match=message):
        parse_config(inspect.InspectConfig, ["--model", "m", *words])


@pytest.mark.parametrize("truncation", ["keep_prompt", "share", "drop"])
@pytest.mark.parametrize("kind", [SFTDataset, PairDataset, PromptDataset])
def test_a_survey_reports_what_the_preparation_does(kind, truncation, tmp_path):
    rows = [Row("p" * (i + 1), "good" * (i % 7), "bad" * (i % 5 + 1)) for i in range(1, 60)]
    rows.append(Row("q", None, None))
    limit = "max_prompt_len" if kind is PromptDataset else "max_seq_len"
    options = {limit: 30, "prompt_format": "plain", "truncation": truncation}
    dataset = kind(rows, make_tokenizer(), **options)
    survey = survey_rows(dataset, num_examples=3, name="rows")
    report = prepare(dataset, cache_dir=None, skip_bad_rows=True, name="rows")
    survey.report.faults = survey.report.faults[: len(report.faults)]
    assert survey.report == report
    assert len(survey.examples) == 3


def test_columns_of_a_known_set(tmp_path):
    rows = [
        {"history": f"q{i}", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 3}
        for i in range(3)
    ]
    write_lines(tmp_path / "stanfordnlp" / "SHP" / "train.jsonl", rows)
    source = load_source(str(tmp_path / "stanfordnlp" / "SHP"))
    found = survey_columns(source, step=2)
    assert found.forms == {"known by its name": 3}
    assert set(found.used) == {"history", "human_ref_A", "human_ref_B", "labels"}
    assert found.unused == {"score_A": 3}
    # Whether a number is used cannot be tried.
    assert set(survey_columns(source, step=3).used) == {"history", "labels"}


NAMED = Reading(columns={"prompt": "info.ask", "chosen": "yes", "rejected": "no"})
USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD_TURN = {"role": "assistant", "content": "bad"}
HH = "\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize(
    "reading, raw, used",
    [
        # Rewards compare with the answer, but step 1 learns it.
        (
            Reading(),
            {"question": "q", "answer": "a", "id": 1},
            {1: {"question", "answer"}, 3: {"question"}},
        ),
        (
            NAMED,
            {"info": {"ask": "q"}, "yes": "a", "no": "b", "prompt": "other"},
            {1: {"info", "yes"}, 2: {"info", "yes", "no"}, 3: {"info"}},
        ),
        (
            Reading(),
            {"prompt": "q", "messages": [USER, GOOD], "system": "s"},
            {1: {"messages", "system"}, 3: {"messages", "system"}},
        ),
        (
            Reading(),
            {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD_TURN]},
            {2: {"chosen", "rejected"}},
        ),
        (
            Reading(),
            {"chosen": HH + " a", "rejected": HH + " b"},
            {2: {"chosen", "rejected"}, 3: {"chosen", "rejected"}},
        ),
    ],
)
def test_used_columns(tmp_path, reading, raw, used):
    source = load_source(write_lines(tmp_path / "rows.jsonl", [raw]), reading=reading)
    for step, names in used.items():
        assert set(survey_columns(source, step=step).used) == names


@given(rows=st.lists(FIELDS, max_size=4), step=st.sampled_from([0, 1, 2, 3]), skip=st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_any_rows_are_shown_or_named_in_an_error(tmp_path_factory, rows, step, skip):
    path = write_lines(tmp_path_factory.mktemp("any") / "rows.jsonl", [*rows, *pairs(20)])
    words = ["--data_path", path, "--model", "m", "--step", str(step), "--max_seq_len", "20"]
    if skip:
        words.append("--skip_bad_rows")
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    with mock.patch.object(inspect, "load_tokenizer", lambda *_, **__: tokenizer):
        try:
            inspect.main(words)
        except ValueError as error:
            assert str(error)


def test_forms_and_columns_are_those_of_the_first_rows(show):
    rows = [*pairs(1000), *({"text": f"t{i}"} for i in range(200))]
    shown = show(rows, "--step", "1", "--num_shown", "0")
    assert "prompt (1000 of the first 1000 rows)" in shown
