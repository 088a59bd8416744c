import json
import logging

import datasets
import pytest

from dschat.data import cache, readers, sources
from dschat.data.blends import hold_out
from dschat.data.forms import Reading
from dschat.data.hub_sets import HUB_SETS
from dschat.data.readers import read_records
from dschat.data.sources import load_source
from tests.unit.data_helpers import pairs, write_lines

GOOD = {"prompt": "p", "chosen": " yes", "rejected": " no"}


def load(path, **options):
    return load_source(str(path), **options)


def rows_of(source, part="train"):
    table = getattr(source, part)
    return [source.row(table, i) for i in range(len(table))]


def all_rows_of(source):
    return rows_of(source, "train") + (rows_of(source, "eval") if source.eval else [])


def held_out(path, **options):
    """Return the training and evaluation prompts of a source that is split."""
    source = load(path)
    parts = hold_out([source], **{"eval_fraction": 0.3, "seed": 1, **options})[0]
    return tuple([source.row(part, i).prompt for i in range(len(part))] for part in parts)


# Line 3 of a file, and what the message must contain.
BAD_LINES = {
    "broken": ('{"prompt": "p", "chosen": ', "not readable as JSON"),
    "a list": ('["p", "c"]', "an object with named fields"),
    "utf-8": (b'{"prompt": "caf\xe9", "chosen": "c"}', "not valid UTF-8: byte 0xe9 at position 15"),
    "surrogate": (r'{"prompt": "p", "chosen": "\ud800"}', '"chosen" is not valid UTF-8'),
    "digits": ('{"prompt": "p", "chosen": ' + "9" * 5000 + "}", "a number of too many digits"),
    "no prompt": (
        {"words": "p", "chosen": "c"},
        'no field "prompt" or "messages" among ["chosen", "words"]',
    ),
    "null prompt": ({"prompt": None, "chosen": "c"}, 'no field "prompt"'),
    "prompt number": ({"prompt": 5.5, "chosen": "c"}, 'field "prompt" is 5.5, not a string'),
    "chosen list": ({"prompt": "p", "chosen": ["c"]}, 'field "chosen" is ["c"], not a string'),
    "empty": ({"prompt": "p", "chosen": ""}, 'field "chosen" is empty ("")'),
    "blank": ({"prompt": "p", "response": " \n"}, 'field "response" is empty (" \\n")'),
    "equal": (
        {"prompt": "p", "chosen": "same", "rejected": " same"},
        '"chosen" and "rejected" are equal ("same")',
    ),
    "no chosen": ({"prompt": "p", "rejected": "r"}, '"rejected" without a field "chosen"'),
    "role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0] is"),
    "content": (
        {"messages": [{"role": "user", "content": None}]},
        'field "messages[0].content" is null',
    ),
    "no user": (
        {"messages": [{"role": "assistant", "content": "x"}]},
        'field "messages" begins with the answer',
    ),
    "no messages": ({"messages": []}, 'field "messages" is an empty list'),
    "text messages": ({"messages": "hello"}, 'field "messages" is "hello", not a list'),
}


@pytest.mark.parametrize("line, words", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_names_file_line_value_and_remedy(tmp_path, caplog, line, words):
    path = write_lines(tmp_path / "rows.jsonl", [GOOD, "", line, *pairs(3)])
    with pytest.raises(ValueError) as caught:
        load(path)
    message = str(caught.value)
    for expected in (f"{path}, line 3: ", words, "--skip_bad_rows"):
        assert expected in message
    assert message.count("line ") == 1
    with caplog.at_level(logging.WARNING):
        source = load(path, skip_bad_rows=True)
    assert len(source.train) == 4
    assert "left out 1 bad rows of 5" in caplog.text
    assert words in caplog.text


def test_many_bad_lines_make_one_message(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": ""}] * 8 + [GOOD])
    with pytest.raises(ValueError) as caught:
        load(path)
    assert [f"line {n}:" in str(caught.value) for n in (1, 5, 6)] == [True, True, False]
    assert "... and 3 more." in str(caught.value)


def test_a_repeated_column_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen,prompt\na,b,c\n")
    with pytest.raises(
        ValueError, match=r"rows.csv, line 1: the header has 'prompt' more than once"
    ):
        load(tmp_path / "rows.csv")
    # Spreadsheets write empty cells.
    (tmp_path / "rows.csv").write_text('prompt,chosen,,\na,b,,\n"",c,,\n')
    source = load(tmp_path / "rows.csv")
    rows = all_rows_of(source)
    assert sorted((row.prompt, row.chosen) for row in rows) == [("", "c"), ("a", "b")]
    assert all(row.columns == {} for row in rows)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
@pytest.mark.parametrize("skip", [False, True])
def test_file_without_rows(tmp_path, content, skip):
    (tmp_path / "none.json").write_text(content)
    with pytest.raises(ValueError, match=r"none.json: no rows in it"):
        load(tmp_path / "none.json", skip_bad_rows=skip)


def test_only_bad_rows_cannot_be_skipped(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"words": "x"}])
    with pytest.raises(ValueError, match="line 1: .*\n.*No row here is usable"):
        load(path, skip_bad_rows=True)


def test_json_list_remembers_lines(tmp_path):
    path = tmp_path / "rows.json"
    text = '\ufeff[\n {"prompt": "a",\n  "chosen": "b"},\n\n {"prompt": "c", "chosen": "d"}\n]\n'
    path.write_text(text, encoding="utf-8")
    records = read_records(path)
    assert list(records.lines) == [2, 5]
    assert [row["prompt"] for row in records.rows] == ["a", "c"]
    assert records.faults == []


@pytest.mark.parametrize(
    "text, line",
    [
        ('[{"a": 1},\n{"a": 2}', 2),
        ('[{"a": 1}\n{"a": 2}]', 2),
        ('[{"a": 1},\n]', 2),
        ('[{"a": 1},\n 3]', 2),
        ('[{"a": 1}]\n\nx', 3),
        ('[\n{"a": }]', 2),
        ("[", 1),
    ],
)
def test_broken_json_list(tmp_path, text, line):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert [number for number, _ in read_records(path).faults] == [line]


def test_unicode_line_separators_inside_json_do_not_end_a_line(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ['{"prompt": "a\u2028b", "chosen": "c\x85"}', GOOD])
    assert list(read_records(tmp_path / "rows.jsonl").lines) == [1, 2]
    assert {row.prompt for row in all_rows_of(load(path))} == {"a\u2028b", "p"}


def test_csv_with_quoted_newlines_and_faults(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,chosen\n"two\nlines",c1\np2,"a,b"\nonly\np3,\xff\n')
    records = read_records(path)
    assert records.rows[:2] == [
        {"prompt": "two\nlines", "chosen": "c1"},
        {"prompt": "p2", "chosen": "a,b"},
    ]
    assert list(records.lines) == [2, 4, 6]
    assert [line for line, _ in records.faults] == [5]
    with pytest.raises(ValueError) as caught:
        load(path)
    assert "rows.csv, line 5: 1 cells under a header of 2" in str(caught.value)
    assert 'rows.csv, line 6: field "chosen" is not valid UTF-8' in str(caught.value)


# Bad rows that leave the rows around them readable.
CSV_FAULTS = {
    "after a quote": '"p"x,c',
    "open": '"5" pipe,c',
    "both": 'p,"says "hi" there"',
    "over lines": '"one\nsays "hi" and bye",c',
}


@pytest.mark.parametrize("line", CSV_FAULTS.values(), ids=CSV_FAULTS)
def test_a_bad_quote_costs_only_its_row(tmp_path, caplog, line):
    lines = [
        "prompt,chosen",
        *(f"p{i},c{i}" for i in range(3)),
        line,
        *(f'"p{i}","c\n{i}"' for i in range(3, 9)),
    ]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(
        ValueError, match=r"rows.csv, line 5: not readable as CSV: .*\n.*--skip_bad_rows"
    ):
        load(tmp_path / "rows.csv")
    with caplog.at_level(logging.WARNING):
        source = load(tmp_path / "rows.csv", skip_bad_rows=True)
    assert sorted(row.prompt for row in all_rows_of(source)) == [f"p{i}" for i in range(9)]
    assert "left out 1 bad rows of 10" in caplog.text


# Faults that hide an unknown number of rows, and the line after which these are.
LOSSES = {
    "unclosed quote": ("csv", 'prompt,chosen\na,b\nc,"d\ne,f\ng,h\n', 3),
    "closed by another row": ("csv", 'prompt,chosen\na,b\nc,"d\ne,f\n"g","h"\ni,j\n', 3),
    "rest of a row": ("csv", 'prompt,chosen\na,b\n"says "hi" to\nme",d\ne,f\n', 3),
    "header": ("csv", '"prompt"x,chosen\na,b\nc,d\n', 1),
    "list": (
        "json",
        '[{"prompt": "a", "chosen": "b"},\n{"prompt": "c" "chosen": "d"},\n'
        '{"prompt": "e", "chosen": "f"}]',
        2,
    ),
    "comma": ("json", '[{"prompt": "a", "chosen": "b"}\n{"prompt": "c", "chosen": "d"}]', 2),
    "two lists": ("json", '[{"prompt": "a", "chosen": "b"}]\n[{"prompt": "c", "chosen": "d"}]', 2),
    "utf-8": ("json", b'[{"prompt": "a", "chosen": "b"},\n{"prompt": "\xff", "chosen": "d"}]', 2),
}


@pytest.mark.parametrize("suffix, text, line", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("skip", [False, True])
def test_rows_that_cannot_be_told_apart_are_never_left_out(tmp_path, suffix, text, line, skip):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        load(path, skip_bad_rows=skip)
    message = str(caught.value)
    assert f"{path}, line {line}: " in message
    assert f"The rows after line {line} cannot be told apart" in message
    assert "--skip_bad_rows cannot leave out the bad one. Fix that line." in message


def test_columns_and_places(tmp_path):
    rows = [{"prompt": f"p{i}", "response": f"r{i}", "gold": i} for i in range(4)]
    source = load(write_lines(tmp_path / "rows.jsonl", rows))
    train = rows_of(source)
    assert len(source.train) == 4
    assert all(row.chosen == f"r{row.prompt[1:]}" and row.rejected is None for row in train)
    assert all(row.columns == {"gold": int(row.prompt[1:])} for row in train)
    assert [row.place for row in train] == [
        f"{tmp_path}/rows.jsonl, line {int(row.prompt[1:]) + 1}" for row in train
    ]


def test_chosen_takes_precedence_over_response(tmp_path):
    row = rows_of(load(write_lines(tmp_path / "r.jsonl", [{**GOOD, "response": " yes"}] * 2)))[0]
    assert (row.chosen, row.rejected, row.columns) == (" yes", " no", {"response": " yes"})


def test_messages(tmp_path):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "u2"},
    ]
    last = {"role": "assistant", "content": "a2", "weight": 1}
    rows = [
        {"messages": [*turns, last]},
        {"messages": turns},
        {"messages": [*turns, last], "rejected": "r"},
        {"prompt": turns, "chosen": "c", "rejected": "r"},
        {"messages": turns, "chosen": "c"},
    ]
    folder = tmp_path / "set"
    write_lines(folder / "train.jsonl", rows)
    write_lines(folder / "eval.jsonl", rows[:1])
    found = rows_of(load(folder))
    answers = [(row.chosen, row.rejected) for row in found]
    assert answers == [("a2", None), (None, None), ("a2", "r"), ("c", "r"), ("c", None)]
    assert all(row.prompt == turns for row in found)


def test_hold_out_is_disjoint_stable_and_never_empty(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", pairs(10))

    train, evaluation = held_out(path)
    assert len(evaluation) == 3
    assert sorted(train + evaluation) == sorted(f"p{i}" for i in range(10))
    assert held_out(path) == (train, evaluation)
    assert held_out(path, seed=2)[1] != evaluation
    assert len(held_out(path, eval_fraction=0.001)[1]) == 1
    with pytest.raises(ValueError, match="--eval_fraction 0"):
        held_out(path, eval_fraction=0)
    with pytest.raises(ValueError, match="one row cannot be split"):
        held_out(write_lines(tmp_path / "one.jsonl", pairs(1)))


def test_no_prompt_is_in_training_and_evaluation(tmp_path, caplog):
    repeated = [{**row, "chosen": f"{row['chosen']}{i}"} for i in range(4) for row in pairs(20)]
    train, evaluation = held_out(write_lines(tmp_path / "rows.jsonl", repeated))
    assert len(train) == 56 and len(evaluation) == 24
    assert not set(train) & set(evaluation)
    # A published evaluation part stays; the training rows of every source give way.
    write_lines(tmp_path / "set" / "train.jsonl", pairs(10))
    write_lines(tmp_path / "set" / "eval.jsonl", pairs(6, 4))
    other = write_lines(tmp_path / "other.jsonl", pairs(30, 5))
    sources = [load(tmp_path / "set"), load(other)]
    parts = hold_out(sources, eval_fraction=0.1, seed=1)
    groups = [[set(part.group.tolist()) for part in pair] for pair in parts]
    assert len(parts[0][1]) == 6
    for trained, _ in groups:
        assert not trained & (groups[0][1] | groups[1][1])
    assert "left out 6 of 10 training rows, which begin like an evaluation row" in caplog.text
    write_lines(tmp_path / "same" / "train.jsonl", pairs(3))
    write_lines(tmp_path / "same" / "eval.jsonl", pairs(3))
    ((train, evaluation),) = hold_out([load(tmp_path / "same")], eval_fraction=0.1, seed=1)
    assert len(train) == len(evaluation) == 3
    assert "every training row begins like an evaluation row, so they are kept" in caplog.text


def test_rows_of_one_conversation_stay_together(tmp_path):
    first = {"role": "user", "content": "hello"}
    turns = [first, {"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}]
    rows = [
        {"messages": [first], "chosen": "c"},
        {"messages": turns, "chosen": "c"},
        {"prompt": "\n\nHuman: hello\n\nAssistant: x\n\nHuman: y\n\nAssistant:", "chosen": "c"},
        {"prompt": "hello", "chosen": "c"},
        {"messages": [{"role": "system", "content": "s"}, *turns], "chosen": "c"},
        {"prompt": "goodbye", "chosen": "c"},
    ]
    source = load(write_lines(tmp_path / "rows.jsonl", rows))
    assert len(set(source.train.group[:5].tolist())) == 1
    assert source.train.group[5] != source.train.group[0]


@pytest.mark.parametrize("kind", ["parquet", "dataset", "dataset_dict"])
def test_arrow_tables_are_checked_and_named_by_row(tmp_path, kind):
    rows = pairs(1500)  # more than one batch of the check
    folder = tmp_path / "set"
    if kind == "parquet":
        folder.mkdir()
        datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
        datasets.Dataset.from_list(pairs(2, 1500)).to_parquet(folder / "eval.parquet")
    elif kind == "dataset":
        datasets.Dataset.from_list(rows).save_to_disk(folder)
    else:
        parts = {
            "train": datasets.Dataset.from_list(rows),
            "test": datasets.Dataset.from_list(pairs(2, 1500)),
        }
        datasets.DatasetDict(parts).save_to_disk(folder)
    source = load(folder, cache_dir=str(tmp_path / "cache"))
    assert isinstance(source.train.table.rows, datasets.Dataset)
    part = source.train
    row = source.row(part, 1100)
    number = int(row.prompt[1:])
    assert row.chosen == f" good{number}" and row.place.endswith(f", row {number + 1}")
    expected = {"parquet": 2, "dataset": None, "dataset_dict": 2}
    assert (source.eval and len(source.eval)) == expected[kind]


def test_bad_row_of_an_arrow_table(tmp_path, caplog):
    datasets.Dataset.from_list([*pairs(1100), {**GOOD, "rejected": ""}]).save_to_disk(
        tmp_path / "set"
    )
    with pytest.raises(ValueError, match=r'set, row 1101: field "rejected" is empty'):
        load(tmp_path / "set")
    source = load(tmp_path / "set", skip_bad_rows=True)
    assert len(source.train) == 1100


@pytest.mark.parametrize("skip", [False, True])
def test_parquet_without_rows(tmp_path, skip):
    datasets.Dataset.from_list(pairs(1)).select([]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="none.parquet: no rows in it"):
        load(tmp_path / "none.parquet", skip_bad_rows=skip, cache_dir=str(tmp_path / "cache"))


def test_hub_set_with_a_script_is_loaded_from_its_converted_branch(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config=None, **options):
        asked.append((name, config, options))
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found x.py")
        raw = [
            {"queries": {"ja": f"q{i}"}, "answers": {"ja": [{"text": f"a{i}" if i else None}]}}
            for i in range(5)
        ]
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(raw)})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = load("mkqa-Japanese", cache_dir="there")
    assert [name for name, _, _ in asked] == ["apple/mkqa"] * 2
    assert asked[1][2] == {
        "data_dir": None,
        "revision": "refs/convert/parquet",
        "cache_dir": "there",
    }
    rows = all_rows_of(source)
    # The row without an answer is left out even without --skip_bad_rows: users cannot fix the set.
    assert sorted((row.prompt, row.chosen) for row in rows) == [
        (f"\n\nHuman: q{i}\n\nAssistant:", f" a{i}") for i in range(1, 5)
    ]


# A raw row of each named set, and the expected texts.
ASKED = "\n\nHuman: q\n\nAssistant:"
NAMED = {
    "Dahoas/rm-static": (
        {"prompt": ASKED, "response": " c", "chosen": " c", "rejected": " r"},
        (ASKED, " c", " r"),
    ),
    "Dahoas/full-hh-rlhf": (
        {"prompt": ASKED, "response": " c", "chosen": " c", "rejected": " r"},
        (ASKED, " c", " r"),
    ),
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        {"prompt": "q", "chosen": "c", "rejected": "r"},
        (ASKED, " c", " r"),
    ),
    "yitingxie/rlhf-reward-datasets": (
        {"prompt": "\n\nHuman: q\n\n", "chosen": "Assistant: c", "rejected": "Assistant: r"},
        (ASKED, " c", " r"),
    ),
    "openai/webgpt_comparisons": (
        {
            "question": {"full_text": "q"},
            "answer_0": "r [1]",
            "answer_1": "c (2)",
            "score_0": -1.0,
            "score_1": 1.0,
        },
        (ASKED, " c", " r"),
    ),
    "stanfordnlp/SHP": (
        {"history": "q", "human_ref_A": "r", "human_ref_B": "c", "labels": 0},
        (ASKED, " c", " r"),
    ),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (
        {"prompt": "USER: q ASSISTANT:", "label": "c"},
        ("Human: q Assistant:", " c", None),
    ),
    "wangrui6/Zhihu-KOL": ({"INSTRUCTION": "q", "RESPONSE": "c"}, (ASKED, " c", None)),
    "Cohere/miracl-zh-queries-22-12": (
        {"query": "q", "positive_passages": [{"text": "c"}], "negative_passages": [{"text": "r"}]},
        (ASKED, " c", " r"),
    ),
    "Cohere/miracl-ja-queries-22-12": (
        {"query": "q", "positive_passages": [{"text": "c"}], "negative_passages": []},
        (ASKED, " c", None),
    ),
    "Hello-SimpleAI/HC3-Chinese": ({"question": "q", "human_answers": ["c"]}, (ASKED, " c", None)),
    "mkqa-Chinese": (
        {"queries": {"zh_cn": "q"}, "answers": {"zh_cn": [{"text": "c"}]}},
        (ASKED, " c", None),
    ),
    "mkqa-Japanese": (
        {"queries": {"ja": "q"}, "answers": {"ja": [{"text": "c"}]}},
        (ASKED, " c", None),
    ),
    "lmqg/qg_jaquad": ({"question": "q", "sentence": "c"}, (ASKED, " c", None)),
    "lmqg/qag_jaquad": ({"questions": ["q"], "paragraph": "c"}, (ASKED, " c", None)),
}


def test_every_named_set_gives_its_texts():
    assert set(NAMED) == set(HUB_SETS)
    for name, (raw, texts) in NAMED.items():
        row = HUB_SETS[name].read(raw, Reading())[0]
        assert (row.prompt, row.chosen, row.rejected) == texts, name


def test_a_tie_has_no_rejected_answer():
    raw = {**NAMED["openai/webgpt_comparisons"][0], "score_0": 0.0, "score_1": 0.0}
    assert HUB_SETS["openai/webgpt_comparisons"].row_function(raw).rejected is None


def test_hub_names_match_exactly(tmp_path):
    """Match a local copy by the end of its path, but not a name that only contains another."""
    raw = NAMED["stanfordnlp/SHP"][0]
    known = load(write_copy(tmp_path / "stanfordnlp" / "SHP", raw))
    assert isinstance(rows_of(known)[0].prompt, str)
    # Another set with these columns is read by its form.
    assert isinstance(rows_of(load(write_copy(tmp_path / "SHP-2", raw)))[0].prompt, list)


def write_copy(folder, raw):
    datasets.Dataset.from_list([raw] * 4).save_to_disk(folder)
    return folder


def test_local_jsonfile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data: no train.json in this folder"):
        load("local/jsonfile")
    (tmp_path / "data").mkdir()
    for name in ("train", "eval"):
        (tmp_path / "data" / f"{name}.json").write_text(
            json.dumps([{"prompt": "p", "chosen": "c", "rejected": " r"}])
        )
    row = rows_of(load("local/jsonfile"))[0]
    assert (row.prompt, row.chosen, row.rejected) == ("p", " c", " r")


def test_what_a_check_found_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CACHED_ROWS", 10)
    path = write_lines(tmp_path / "rows.jsonl", [{**row, "more": 1} for row in pairs(20)])
    cache = str(tmp_path / "cache")
    first = load(path, cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_check_table", None)  # a call would fail
        second = load(path, cache_dir=cache)
    assert rows_of(first) == rows_of(second)
    assert first.train.columns == second.train.columns == {"more": 20}
    for name in ("index", "pick", "group"):
        assert (getattr(first.train, name) == getattr(second.train, name)).all()
    # Other rows, or another reading, are checked again.
    assert load(path, cache_dir=cache, reading=Reading(columns={"chosen": "rejected"}))
    write_lines(tmp_path / "rows.jsonl", pairs(19))
    assert len(load(path, cache_dir=cache).train) == 19


def test_a_second_start_does_not_read_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CACHED_ROWS", 10)
    monkeypatch.setattr(readers, "CACHED_BYTES", 1)
    monkeypatch.setattr(cache, "SETTLED_NS", -1)
    path = write_lines(tmp_path / "rows.jsonl", [*pairs(9), "[1]", *pairs(9, begin=9)])
    options = {"cache_dir": str(tmp_path / "cache"), "skip_bad_rows": True}
    first = load(path, **options)
    cache._file_digest.cache_clear()
    with monkeypatch.context() as patch:
        for module, name in (
            (sources, "_check_table"),
            (readers, "_find_lines"),
            (cache, "file_entry"),
        ):
            patch.setattr(module, name, None)  # a call would fail
        second = load(path, **options)
    assert rows_of(first) == rows_of(second)
    assert [second.train.place(i) for i in (0, 17)] == [f"{path}, line {i}" for i in (1, 19)]
    assert first.train.warning == second.train.warning and "line 10" in first.train.warning
    # The same size, but other rows.
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("good0", "fine0"))
    assert rows_of(load(path, **options))[0].chosen == " fine0"


def test_rows_with_one_prompt_for_all_are_told_apart_by_their_answers(tmp_path):
    rows = [{"prompt": "Review:", "chosen": f" c{i}", "rejected": " r"} for i in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    source = load(path)
    assert len(set(source.train.group.tolist())) == 20
    train, evaluation = hold_out([source], eval_fraction=0.2, seed=1)[0]
    assert (len(train), len(evaluation)) == (16, 4)
