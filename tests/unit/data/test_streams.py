"""Training on rows that are read as they come."""

import gzip
import itertools
import json
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from dschat.config.group_checks import streaming_problems
from dschat.config.options import BatchOptions, ScheduleOptions
from dschat.config.sft import SFTData
from dschat.data.collate import collate_pairs, collate_text
from dschat.data.loaders import build_pair_data, build_sft_data, make_loaders
from dschat.data.splits import SPLIT_SALT, Assignment, share_of
from dschat.data.streams import Position, StreamLoader
from tests.unit.data_helpers import EOS, PAD, make_tokenizer, pairs, write_lines

NUM_ROWS = 90


def options(path, **changes) -> SFTData:
    given = {"data_split": "0,1,0", "eval_fraction": 0.2, "max_seq_len": 60, "shuffle_buffer": 16}
    given |= {"data_path": path if isinstance(path, list) else [str(path)], "streaming": True}
    return SFTData(**{**given, **changes})


def loader(path, *, rank=0, world_size=1, batch_size=3, **changes) -> StreamLoader:
    data = options(path, **changes)
    train, _ = build_pair_data(data, make_tokenizer(), end_token_id=EOS, cut_fraction=0.3, seed=5)

    def collate(items):
        return collate_pairs(items, pad_id=PAD)

    shard = {"rank": rank, "world_size": world_size, "seed": 7}
    return StreamLoader(train, train.stream, collate, batch_size=batch_size, **shard)


def take(stream: StreamLoader, count: int) -> list:
    batches = iter(stream)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return [batch.input_ids.tolist() for batch in taken]


def texts(stream: StreamLoader, count: int) -> list[str]:
    """Return what is compared in the next pairs, without the random cut."""
    stream.dataset.cut_fraction = 0.0
    half = [row for rows in take(stream, count) for row in rows[: len(rows) // 2]]
    tokenizer = stream.dataset.tokenizer
    return [tokenizer.decode(row, skip_special_tokens=True) for row in half]


def items_of_pass(stream: StreamLoader, passes: int) -> list[tuple]:
    """Return the prompts of this rank's rows of a pass, in their order."""
    stream.dataset.cut_fraction = 0.0
    found = stream._items(Position(passes))
    mine = itertools.takewhile(lambda item: item[1].passes == passes, found)
    return [tuple(item["chosen_ids"]) for item, _ in mine]


class Saved:
    """What a checkpoint has of this rank."""

    same_processes = True

    def __init__(self, state):
        self.values = (state[0], json.loads(json.dumps(state[1])))

    def of_rank(self):
        return self.values


@pytest.fixture
def path(tmp_path):
    rows = [row if number % 7 else "{broken" for number, row in enumerate(pairs(NUM_ROWS))]
    return write_lines(tmp_path / "rows.jsonl", rows)


def test_a_resumed_stream_gives_the_same_batches(path):
    whole = take(loader(path, skip_bad_rows=True), 60)  # more than two passes
    for done in (1, 7, 23, 59):
        first = loader(path, skip_bad_rows=True)
        take(first, done)
        again = loader(path, skip_bad_rows=True)
        again.restore(Saved(first.state()))
        assert take(again, 60 - done) == whole[done:], done


def test_a_row_of_several_pairs_is_resumed_within_it(tmp_path):
    rows = [
        {"prompt": f"q{i}", "completions": [f"a{i}", "b", "c", "d"], "scores": [3, 2, 1, 0]}
        for i in range(20)
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    whole = take(loader(path, pairs="all", batch_size=4), 30)
    first = loader(path, pairs="all", batch_size=4)
    take(first, 11)
    assert first.position.item not in (0, 6)
    again = loader(path, pairs="all", batch_size=4)
    again.restore(Saved(first.state()))
    assert take(again, 19) == whole[11:]


def test_ranks_share_every_pass(path):
    stream = loader(path, skip_bad_rows=True)
    first, second = items_of_pass(stream, 0), items_of_pass(stream, 1)
    assert first != second and sorted(first) == sorted(second) and len(set(first)) == len(first)
    shares = [
        items_of_pass(loader(path, rank=rank, world_size=2, skip_bad_rows=True), 0)
        for rank in range(2)
    ]
    assert all(shares) and sorted(shares[0] + shares[1]) == sorted(first)


def test_held_out_rows_are_not_trained_on(path):
    data = options(path, skip_bad_rows=True)
    train, held_out = build_pair_data(data, make_tokenizer(), end_token_id=EOS)
    trained = texts(loader(path, skip_bad_rows=True), 60)
    evaluated = {held_out.row(i).prompt for i in range(len(held_out))}
    assert evaluated and not evaluated & {text.split(" ")[0] for text in trained}


def test_the_split_is_that_of_rows_that_are_known():
    group = np.random.RandomState(0).randint(0, 2**63, 4000).astype(np.uint64)
    shares = [Fraction(2), Fraction(4), Fraction(4)]
    known = Assignment(3, SPLIT_SALT).assign(group, shares)
    alone = np.array([share_of(int(value), shares, 3, SPLIT_SALT) for value in group])
    assert (known == alone).mean() > 0.97


def test_files_of_any_kind_and_several_sets(tmp_path, path):
    good = pairs(NUM_ROWS, begin=100)
    compressed = tmp_path / "more.jsonl.gz"
    compressed.write_bytes(gzip.compress("\n".join(map(json.dumps, good)).encode()))
    folder = tmp_path / "set"
    folder.mkdir()
    pyarrow.parquet.write_table(
        pa.Table.from_pylist(pairs(30, begin=300)), folder / "train.parquet"
    )
    stream = loader([path, str(compressed), str(folder)], skip_bad_rows=True)
    numbers = [int("".join(filter(str.isdigit, text.split(" ")[0]))) for text in texts(stream, 30)]
    for begin in (0, 100, 300):
        assert any(begin <= number < begin + NUM_ROWS for number in numbers)


def test_step_1_streams_texts(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [f'"text {i}"' for i in range(40)])
    data = options(path, data_split="1,0,0")
    train, held_out = build_sft_data(data, make_tokenizer(), end_token_id=EOS)
    sizes = {"train_batch_size": 2, "eval_batch_size": 2, "window": 1, "seed": 0}
    stream, _ = make_loaders(train, held_out, collate_text, pad_id=PAD, **sizes)
    assert isinstance(stream, StreamLoader)
    batch = next(iter(stream))
    assert batch.input_ids.shape[0] == 2 and train.text_format == "plain"


def test_a_bad_row_stops_the_run_by_its_place(tmp_path):
    rows = [*pairs(30), {"prompt": "p", "chosen": ""}, *pairs(30, begin=30)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match='line 31: field "chosen" is empty.*\n.*--skip_bad_rows'):
        take(loader(path), 20)
    stream = loader(path, skip_bad_rows=True)
    take(stream, 20)
    assert stream.stream.num_bad >= 1


def test_another_number_of_processes_is_refused(path):
    stream = loader(path, skip_bad_rows=True)
    saved = Saved(stream.state())
    saved.same_processes = False
    with pytest.raises(ValueError, match="as many processes"):
        stream.restore(saved)


def test_data_that_cannot_be_streamed(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("prompt,chosen,rejected\np,a,b\n")
    with pytest.raises(ValueError, match="rows.csv cannot be read as a stream"):
        loader(table)
    few = write_lines(tmp_path / "few.jsonl", pairs(1))
    with pytest.raises(ValueError, match="Give a larger --shuffle_buffer"):
        loader(few)
    long = write_lines(tmp_path / "long.jsonl", [*pairs(20), *pairs(20, begin=20)])
    stream = loader(long)
    stream.dataset.limit = 1  # nothing fits any longer
    with pytest.raises(ValueError, match="no row that this process can use"):
        take(stream, 1)


def test_flags_that_need_the_number_of_rows_are_refused():
    known = ScheduleOptions(max_train_steps=3)
    batch = BatchOptions()
    assert streaming_problems(options("x"), known, batch) == []
    for data, schedule, flag in (
        (options("x"), ScheduleOptions(), "--max_train_steps"),
        (options("x", blend=[1.0]), known, "--blend"),
        (options("x", blend_temperature=2.0), known, "--blend_temperature"),
        (options("x", sft_only_data_path=["y"]), known, "--sft_only_data_path"),
        (options("x", shuffle_buffer=1), known, "--shuffle_buffer"),
    ):
        (problem,) = streaming_problems(data, schedule, batch)
        assert flag in problem
    for changes in ({"packing": True}, {"tokens_per_batch": 512}):
        (problem,) = streaming_problems(options("x"), known, BatchOptions(**changes))
        assert f"--{next(iter(changes))}" in problem
    assert streaming_problems(options("x", streaming=False), ScheduleOptions(), batch) == []


def test_the_thread_ends_with_its_reader(path):
    import threading

    before = threading.active_count()
    for _ in range(3):
        batches = iter(loader(path, skip_bad_rows=True))
        list(itertools.islice(batches, 2))
        batches.close()
    for thread in threading.enumerate():
        if thread.daemon and thread.name.startswith("Thread"):
            thread.join(5)
    assert threading.active_count() <= before
