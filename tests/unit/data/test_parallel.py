"""Rows that are read and tokenized in forks are those of one process."""

import multiprocessing
import os

import pytest

from dschat.config.sft import SFTData
from dschat.data import parallel, sources
from dschat.data.loaders import build_sft_data
from dschat.data.parallel import map_rows
from tests.unit.data_helpers import make_tokenizer, pairs, write_lines


@pytest.fixture
def forks(monkeypatch):
    """Three forks, also for few rows."""
    monkeypatch.setattr(parallel, "threads_per_rank", lambda ranks: 3)
    monkeypatch.setattr(parallel, "CHUNK_ROWS", 4)
    monkeypatch.setattr(parallel, "MIN_CHUNKS", 2)


def numbers_and_process(numbers: range) -> tuple[list[int], int]:
    return list(numbers), os.getpid()


def test_chunks_keep_their_order(forks):
    found = list(map_rows(numbers_and_process, 30, name="rows"))
    assert [n for numbers, _ in found for n in numbers] == list(range(30))
    processes = {process for _, process in found}
    assert len(processes) == 3 and os.getpid() not in processes
    assert not multiprocessing.active_children()


def test_few_rows_stay_in_this_process(monkeypatch):
    monkeypatch.setattr(parallel, "threads_per_rank", lambda ranks: 3)
    assert list(map_rows(numbers_and_process, 3, name="rows")) == [([0, 1, 2], os.getpid())]
    assert not list(map_rows(numbers_and_process, 0, name="rows"))


def fail_at_9(numbers: range) -> int:
    if 9 in numbers:
        raise ValueError("row 9")
    return len(numbers)


def end_at_9(numbers: range) -> int:
    if 9 in numbers:
        os._exit(1)
    return len(numbers)


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [(fail_at_9, ValueError, "row 9"), (end_at_9, RuntimeError, "has ended")],
)
def test_a_failing_chunk_ends_all_forks(forks, function, kind, message):
    found = []
    with pytest.raises(kind, match=message):
        found += map_rows(function, 30, name="rows")
    assert not multiprocessing.active_children()


def test_a_reader_that_stops_early_ends_all_forks(forks):
    results = map_rows(numbers_and_process, 30, name="rows")
    next(results)
    results.close()
    assert not multiprocessing.active_children()


def test_data_are_those_of_one_process(tmp_path, monkeypatch, request, caplog):
    rows = pairs(60)
    rows[7] = {"prompt": "p"}
    rows[31] = {"prompt": None, "chosen": 3}
    rows[40]["response"] = "unused"
    path = write_lines(tmp_path / "rows.jsonl", rows)

    def built():
        sources.code_digest.cache_clear()
        data = SFTData(
            data_path=[path],
            data_split="1,0,0",
            skip_bad_rows=True,
            max_seq_len=20,
            data_output_path=str(tmp_path / f"cache{len(list(tmp_path.iterdir()))}"),
        )
        train, held_out = build_sft_data(data, make_tokenizer(), end_token_id=1)
        texts = [record.getMessage() for record in caplog.records]
        caplog.clear()
        items = [train[i] for i in range(len(train))]
        return items, train.items_digest, held_out.items_digest, texts

    caplog.set_level("INFO")
    alone = built()
    request.getfixturevalue("forks")
    assert built() == alone
    texts = " ".join(alone[-1])
    assert "left out 1 bad rows" in texts and "longest: 11 tokens" in texts
