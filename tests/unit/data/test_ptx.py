"""Text for the PTX loss."""

import itertools
import json
import logging

import datasets
import pytest

from dschat.data.ptx import PTXBatches, load_texts
from dschat.demo.tiny_models import byte_tokenizer


def test_texts_of_local_files(tmp_path):
    text = tmp_path / "a.txt"
    rows = tmp_path / "b.jsonl"
    text.write_text("first\nline\n\n\nsecond\n")
    rows.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    assert load_texts(str(text)) == ["first\nline", "second"]
    assert load_texts(str(rows)) == ["one", "two"]


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("none.txt", None, "no such file"),
        ("empty.txt", "\n\n", "no text"),
        ("rows.jsonl", '{"text": "a"}\n{"body": "b"}\n', "line 2: no field text"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "line 2"),
        (
            "half.jsonl",
            '{"text": "a"}\n{"text": "\\ud800"}\n',
            'line 2: field "text" is not valid UTF-8',
        ),
        ("latin.txt", b"caf\xe9 au lait", "not valid UTF-8: .* at byte 3"),
    ],
)
def test_bad_files_are_named_with_the_flag(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as caught:
        load_texts(str(tmp_path / name))
    assert "--unsupervised_dataset_name" in str(caught.value)


def write_set(folder, texts, kind=None):
    folder.mkdir()
    features = datasets.Features({"text": datasets.Value(kind)}) if kind else None
    table = datasets.Dataset.from_dict({"text": texts}, features=features)
    table.to_parquet(folder / "train.parquet")
    return str(folder)


def test_null_texts_of_a_set_are_left_out_and_counted(tmp_path, caplog):
    name = write_set(tmp_path / "set", ["one", None, "two", None, "", "three"])
    with caplog.at_level(logging.WARNING):
        texts = load_texts(name, cache_dir=str(tmp_path / "cache"))
    assert [texts[number] for number in range(len(texts))] == ["one", "two", "", "three"]
    assert f"{name}: left out 2 rows of 6: their field text is null" in caplog.text


def test_large_strings_are_texts(tmp_path, caplog):
    texts = load_texts(
        write_set(tmp_path / "set", ["one", "two"], "large_string"),
        cache_dir=str(tmp_path / "cache"),
    )
    assert list(texts) == ["one", "two"] and "left out" not in caplog.text


@pytest.mark.parametrize(
    "texts, words",
    [
        ([1, 2], "its field text holds int64, not strings"),
        ([["a"], ["b"]], "its field text holds .*string.*, not strings"),
        ([{"a": "b"}], "its field text holds .*string.*, not strings"),
        ([b"a"], "its field text holds binary, not strings"),
        ([None, None], "no text in it"),
    ],
)
def test_a_set_without_texts_is_refused(tmp_path, texts, words):
    name = write_set(tmp_path / "set", texts)
    with pytest.raises(ValueError, match=f"--unsupervised_dataset_name {name}: {words}"):
        load_texts(name, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["x" * 256 + ".txt", "x" * 256])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="^--unsupervised_dataset_name x*(.txt)?: "):
        load_texts(name, cache_dir=str(tmp_path / "cache"))


def test_blocks_are_full_and_every_text_is_read_once_per_epoch():
    tokenizer = byte_tokenizer(add_bos=False)
    texts = ["aaa", "bbb", "ccc", "ddd"]  # 4 tokens each with their EOS
    batches = PTXBatches(texts, tokenizer, batch_size=2, block_size=4, rank=0, world_size=1, seed=3)
    first = []
    for batch in itertools.islice(batches, 2):
        first.extend(tokenizer.decode(row) for row in batch.input_ids)
    assert sorted(first) == ["aaa</s>", "bbb</s>", "ccc</s>", "ddd</s>"]
    batch = next(batches)
    assert batch.input_ids.shape == (2, 4) and batch.attention_mask.all()
    assert batch.labels.tolist() == batch.input_ids.tolist()


def test_ranks_read_different_texts():
    tokenizer = byte_tokenizer(add_bos=False)
    texts = [letter * 3 for letter in "abcdef"]
    seen = []
    for rank in (0, 1):
        batches = PTXBatches(
            texts, tokenizer, batch_size=3, block_size=4, rank=rank, world_size=2, seed=0
        )
        seen.append({tokenizer.decode(row) for row in next(batches).input_ids})
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 6


def test_the_digest_tells_other_texts():
    def digest(texts):
        options = dict(batch_size=1, block_size=2, rank=0, world_size=1, seed=1)
        return PTXBatches(texts, byte_tokenizer(), **options).digest

    assert digest(["a", "b"]) == digest(["a", "b"])
    others = (["a", "c"], ["b", "a"], ["ab"], ["a", "b", ""], ["a 1 b"])
    assert all(digest(other) != digest(["a", "b"]) for other in others)
