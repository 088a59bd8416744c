"""Rows in memory are prepared and checked like those of files."""

import datasets
import pytest

from dschat.config.sft import SFTData
from dschat.data import preparation, sources
from dschat.data.loaders import build_pair_data, build_prompt_data, build_sft_data
from dschat.data.memory import tables_in_memory
from tests.unit.data_helpers import EOS, make_tokenizer, pairs, write_lines

BUILD = {
    "1,0,0": lambda data, **given: build_sft_data(
        data, make_tokenizer(), end_token_id=EOS, **given
    ),
    "0,1,0": lambda data, **given: build_pair_data(
        data, make_tokenizer(), end_token_id=EOS, **given
    ),
    "0,0,1": lambda data, **given: build_prompt_data(
        data, make_tokenizer(), max_prompt_len=50, **given
    ),
}


def options(path: str, tmp_path, **more) -> SFTData:
    return SFTData(data_path=[path], data_output_path=str(tmp_path / "cache"), **more)


def digests(parts) -> list[str]:
    return [part.items_digest for part in parts]


def build(rows, tmp_path, *, evaluation=None, split="1,0,0", **more):
    tables = tables_in_memory(rows, evaluation)
    data = options("train_dataset", tmp_path, data_split=split, **more)
    return BUILD[split](data, given={"train_dataset": tables})


@pytest.mark.parametrize("split", BUILD)
@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_rows_become_the_items_of_a_file(split, kind, tmp_path):
    rows = pairs(40)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    of_file = BUILD[split](options(path, tmp_path, data_split=split))
    assert digests(build(kind(rows), tmp_path, split=split)) == digests(of_file)


def test_evaluation_rows_are_those_given(tmp_path):
    train, held_out = build(pairs(6), tmp_path, evaluation=pairs(3, begin=50))
    assert len(train) == 6
    assert [row.prompt for row in held_out.rows] == ["p50", "p51", "p52"]
    parts = {"train": pairs(6), "test": pairs(3, begin=50)}
    both = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    assert digests(build(both, tmp_path)) == digests((train, held_out))


def test_a_format_of_arrays_is_left_out(tmp_path):
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": role, "content": f"{role} {i}"} for role in roles]}
        for i in range(20)
    ]
    formatted = datasets.Dataset.from_list(rows).with_format("numpy")
    assert digests(build(formatted, tmp_path)) == digests(build(rows, tmp_path))


def test_bad_rows_are_named_by_their_number_or_left_out(tmp_path):
    rows = [*pairs(20), {"a": 1}, 5, {"text"}]
    with pytest.raises(ValueError, match="train_dataset, row 21: ") as raised:
        build(rows, tmp_path)
    message = str(raised.value)
    assert "train_dataset, row 22: an object with named fields" in message
    assert "train_dataset, row 23: " in message and "--skip_bad_rows" in message
    train, held_out = build(rows, tmp_path, skip_bad_rows=True)
    assert len(train) + len(held_out) == 20


def test_rows_are_prepared_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CACHED_ROWS", 10)  # check once, too
    first = digests(build(pairs(20), tmp_path))
    encoded = []
    original = preparation._write
    monkeypatch.setattr(preparation, "_write", lambda *a: encoded.append(1) or original(*a))
    assert digests(build(pairs(20), tmp_path)) == first and not encoded
    other = [*pairs(19), {"prompt": "new", "chosen": " a", "rejected": " b"}]
    assert digests(build(other, tmp_path)) != first and encoded


@pytest.mark.parametrize(
    "rows",
    ["rows.jsonl", {"prompt": ["a"]}, iter(pairs(3)), 7],
    ids=["text", "columns", "iterator", "number"],
)
def test_other_types_are_refused(rows):
    with pytest.raises(ValueError, match=r"train_dataset is of the type .*: give a list"):
        tables_in_memory(rows)


def test_a_dictionary_of_parts_needs_one_to_train_on():
    parts = datasets.DatasetDict({"test": datasets.Dataset.from_list(pairs(2))})
    with pytest.raises(ValueError, match="its parts are test, and none is called train"):
        tables_in_memory(parts)


def test_values_without_json_are_hashed():
    first, second = (
        tables_in_memory([{"text": "a", "when": value}])["train"].content for value in ({1}, {2})
    )
    assert first != second
