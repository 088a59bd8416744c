"""Training rows that are read while the run trains, for data sets larger than the disk.

Rows are shuffled within blocks of --shuffle_buffer rows that follow each other. Each rank takes its
share of every block. A place in the stream is thus four numbers, from which a run can resume.
"""

import gzip
import io
import itertools
import json
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet

from dschat.config.options import TextOptions
from dschat.data.blends import PREFERRED_PARTS, make_reading
from dschat.data.cache import digest_of
from dschat.data.datasets import LeftOut, TextDataset
from dschat.data.forms import ROW_FAULTS
from dschat.data.hub_sets import HubSet
from dschat.data.readers import BARE_TEXT, BOM, JSON_LINES, file_suffix
from dschat.data.row import Row
from dschat.data.sources import conversation_group, find_hub_set
from dschat.data.splits import HOLD_OUT_SALT, SPLIT_SALT, parse_shares, share_of
from dschat.data.tables import find_train_files, parse_entry
from dschat.data.text_checks import describe_fault

logger = logging.getLogger(__name__)

LINE_SUFFIXES = tuple(suffix + end for suffix in JSON_LINES for end in ("", ".gz", ".zst"))
CHUNK_ROWS = 128  # rows that are tokenized at once
BATCHES_AHEAD = 8
SAMPLE_ROWS = 200  # training rows that are checked at the start
ENDLESS = 2**40  # batches of a stream, whose number of rows is unknown


@dataclass(frozen=True)
class RawRow:
    """A row as it is stored."""

    place: str
    value: bytes | dict  # a line of JSON, or an object
    hub_set: HubSet


@dataclass(frozen=True)
class Position:
    """A place in a rank's stream: what is used."""

    passes: int = 0  # through all rows
    block: int = 0  # whole blocks of this pass
    row: int = 0  # rows of this rank's share of the block
    item: int = 0  # items of that row, which may hold several pairs


class Stream:
    """The raw rows of all data sets in turn, and which of them a step trains on.

    Args:
        data: the options.
        step: 1 or 2.
        needs: "chosen" or "rejected": the text that every row must have.

    Raises:
        ValueError: a data set that cannot be streamed.
    """

    def __init__(self, data: TextOptions, *, step: int, needs: str):
        self.data = data
        self.needs = needs
        self.step = step
        self.reading = make_reading(data, step=step)
        self.shares = parse_shares(data.data_split)
        evaluated = Fraction(data.eval_fraction)
        self.eval_shares = [1 - evaluated, evaluated]
        self.sources = [_open_source(path, data, step) for path in data.data_path]
        self.num_bad = 0
        self.left_out: Counter[str] = Counter()

    @property
    def digest(self) -> str:
        """A hash of the names and sizes of the files."""
        return digest_of(*(source.identity.encode() for source in self.sources))

    def raw_rows(self) -> Iterator[RawRow]:
        """Iterate over the rows of one pass: one of each data set in turn, until all have ended."""
        open_sources = [source.read() for source in self.sources]
        while open_sources:
            for rows in list(open_sources):
                row = next(rows, None)
                if row is None:
                    open_sources.remove(rows)
                else:
                    yield row

    def rows_of(self, raw: RawRow) -> tuple[list[Row], list[Row]]:
        """Read a raw row as this step's training rows and held-out rows, mostly one or none.

        A bad row is counted and left out with --skip_bad_rows.

        Raises:
            ValueError: a bad row; names its place.
        """
        try:
            value = json.loads(raw.value) if isinstance(raw.value, bytes) else raw.value
            value = {BARE_TEXT: value} if isinstance(value, str) else value
            rows = [replace(row, place=raw.place) for row in raw.hub_set.read(value, self.reading)]
            mine = [row for row in rows if self._belongs(row)]
            for row in mine:
                if getattr(row, self.needs) is None:
                    raise ValueError(f'no "{self.needs}", which step {self.step} needs')
        except ROW_FAULTS as error:
            self.add_fault(f"{raw.place}: {describe_fault(error)}")
            return [], []
        is_eval = [self._share(row, self.eval_shares, HOLD_OUT_SALT) == 1 for row in mine]
        parts = [
            [row for row, evaluated in zip(mine, is_eval, strict=True) if evaluated == wanted]
            for wanted in (False, True)
        ]
        return parts[0], parts[1]

    def add_fault(self, message: str) -> None:
        """Count a bad row.

        Raises:
            ValueError: without --skip_bad_rows.
        """
        if not self.data.skip_bad_rows:
            raise ValueError(
                f"{message}.\nFix the row, or leave such rows out with --skip_bad_rows. The forms "
                "that rows may have are in docs/data.md."
            )
        self.num_bad += 1
        if _is_power_of_two(self.num_bad):  # few lines for many rows
            logger.warning("left out %d bad rows so far; the last: %s", self.num_bad, message)

    def add_left_out(self, reason: str) -> None:
        """Count a row that is sound but not used."""
        self.left_out[reason] += 1
        if _is_power_of_two(self.left_out[reason]):
            logger.info("left out %d rows so far: %s", self.left_out[reason], reason)

    def first_rows(self) -> tuple[list[Row], list[Row]]:
        """Return the first training rows, and the held-out rows of the first block.

        Raises:
            ValueError: there are none.
        """
        train: list[Row] = []
        held_out: list[Row] = []
        num_raw = 0
        for raw in itertools.islice(self.raw_rows(), self.data.shuffle_buffer):
            num_raw += 1
            trained, evaluated = self.rows_of(raw)
            train += trained
            held_out += evaluated
        if not train or not held_out:
            raise ValueError(
                f"--streaming: the first {num_raw} rows have {len(train)} training rows and "
                f"{len(held_out)} evaluation rows of step {self.step}. Give a larger "
                "--shuffle_buffer, a larger --eval_fraction, or the step a larger share with "
                "--data_split."
            )
        logger.info(
            "step %d: streaming %s; evaluating on the %d held-out rows among the first %d",
            self.step,
            " ".join(self.data.data_path),
            len(held_out),
            num_raw,
        )
        self.num_bad = 0  # these rows are read again, and counted, in training
        return train[:SAMPLE_ROWS], held_out

    def _belongs(self, row: Row) -> bool:
        return self._share(row, self.shares, SPLIT_SALT) == self.step - 1

    def _share(self, row: Row, shares: Sequence[Fraction], salt: int) -> int:
        return share_of(conversation_group(row), shares, self.data.data_seed, salt)


class StreamLoader:
    """A rank's endless batches of a stream, made ahead by a thread.

    It takes the place of a ``DataLoader`` and of its sampler.

    Args:
        dataset: encodes the rows; has the stream.
        collate: makes a batch of a list of items.
        batch_size: rows of a batch.
        rank: the rank whose share of each block is read.
        world_size: the number of ranks.
        seed: seed of the shuffling.
    """

    def __init__(
        self,
        dataset: TextDataset,
        stream: Stream,
        collate: Callable,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
    ):
        self.dataset = dataset
        self.stream = stream
        self.collate = collate
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.position = Position()  # after the last batch that was taken
        self.sampler = self

    def __len__(self) -> int:
        """Return a number that no run reaches."""
        return ENDLESS

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Do nothing: the stream continues from `position`."""

    def state(self) -> tuple[dict, dict]:
        """Return this rank's position for a checkpoint."""
        return {}, {"position": vars(self.position), "num_bad": self.stream.num_bad}

    def restore(self, saved: Any) -> None:
        """Continue from the position that ``state`` returned.

        Raises:
            ValueError: the run had another number of processes.
        """
        if not saved.same_processes:
            raise ValueError(
                "--resume: with --streaming each process reads its own share of the rows. Resume "
                "with as many processes as before."
            )
        values = saved.of_rank()[1]
        self.position = Position(**values["position"])
        self.stream.num_bad = values["num_bad"]

    def __iter__(self) -> Iterator:
        """Yield batches, from `position` on."""
        made: queue.Queue = queue.Queue(BATCHES_AHEAD)
        stopped = threading.Event()
        arguments = (self._batches(self.position), made, stopped)
        threading.Thread(target=_fill, args=arguments, daemon=True).start()
        try:
            while True:
                found = made.get()
                if isinstance(found, BaseException):
                    raise found
                batch, self.position = found
                yield batch
        finally:
            stopped.set()

    def _batches(self, begin: Position) -> Iterator[tuple[Any, Position]]:
        items = self._items(begin)
        while True:
            taken = list(itertools.islice(items, self.batch_size))
            yield self.collate([item for item, _ in taken]), taken[-1][1]

    def _items(self, begin: Position) -> Iterator[tuple[dict, Position]]:
        """Yield items, pass after pass, each with the position after it."""
        size = self.stream.data.shuffle_buffer
        for passes in itertools.count(begin.passes):
            rows = self.stream.raw_rows()
            first_block, begin_row, used = begin.block, begin.row, begin.item
            begin = Position()
            found = first_block > 0
            next(itertools.islice(rows, first_block * size, first_block * size), None)
            for block in itertools.count(first_block):
                raw = list(itertools.islice(rows, size))
                if not raw:
                    break
                random_state = np.random.RandomState([self.seed & 0xFFFFFFFF, passes, block])
                order = random_state.permutation(len(raw))[self.rank :: self.world_size]
                for number, row_items in self._encode(raw, order.tolist(), begin_row):
                    for count, item in enumerate(row_items[used:], used + 1):
                        found = True
                        index = block * size + order[number]
                        yield (
                            self.dataset.item(int(index), item),
                            Position(passes, block, number, count),
                        )
                    used = 0
                begin_row = 0
            if not found:
                raise ValueError(
                    "--streaming: a whole pass through the data has no row that this process can "
                    "use. Give more rows, or fewer processes."
                )

    def _encode(
        self, raw: list[RawRow], order: list[int], begin: int
    ) -> Iterator[tuple[int, list[dict]]]:
        """Yield the number in `order` of each row from `begin` on, with its items."""
        dataset = self.dataset
        for first in range(begin, len(order), CHUNK_ROWS):
            numbers = range(first, min(first + CHUNK_ROWS, len(order)))
            rows, rendered = [], []
            for number in numbers:
                for row in self.stream.rows_of(raw[order[number]])[0]:
                    try:
                        rendered.append(dataset.render(row))
                        rows.append((number, row))
                    except ValueError as error:
                        self.stream.add_fault(str(error))
            items: dict[int, list[dict]] = {number: [] for number in numbers}
            encoded_rows = dataset.encoder.encode_all(rendered)
            for (number, row), encoded in zip(rows, encoded_rows, strict=True):
                try:
                    items[number].append(dataset.fit(row, encoded))
                except LeftOut as reason:
                    self.stream.add_left_out(reason.kind)
                except ValueError as error:
                    self.stream.add_fault(str(error))
            yield from items.items()


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _fill(batches: Iterator, made: queue.Queue, stopped: threading.Event) -> None:
    """Put batches, or the error that ends them, into a queue, until its reader stops."""
    while not stopped.is_set():
        try:
            found = next(batches)
        except BaseException as error:  # raised again by the reader
            found = error
        while not stopped.is_set():
            try:
                made.put(found, timeout=1.0)
                break
            except queue.Full:
                continue
        if isinstance(found, BaseException):
            return


@dataclass(frozen=True)
class _Source:
    identity: str  # changes if the rows do
    read: Callable[[], Iterator[RawRow]]


def _open_source(path: str, data: TextOptions, step: int) -> _Source:
    entry = parse_entry(path)
    hub_set = find_hub_set(entry.path) or HubSet()
    split = entry.split or data.dataset_split
    files = find_train_files(entry.path, split, PREFERRED_PARTS[step])
    if files is None:
        config = entry.config or hub_set.config or data.dataset_config
        return _open_hub(hub_set.repository or entry.path, config, split or "train", hub_set)
    for file in files:
        if file_suffix(file) not in (*LINE_SUFFIXES, ".parquet"):
            raise ValueError(
                f"--streaming: {file} cannot be read as a stream. Give {', '.join(LINE_SUFFIXES)} "
                "or .parquet, or leave --streaming out."
            )
    identity = " ".join(f"{file.name} {file.stat().st_size}" for file in files)
    return _Source(identity, lambda: _read_files(files, hub_set))


def _open_hub(name: str, config: str | None, split: str, hub_set: HubSet) -> _Source:
    def read() -> Iterator[RawRow]:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, value in enumerate(rows, 1):
            yield RawRow(f"{name} ({split}), row {number}", value, hub_set)

    return _Source(f"{name} {config} {split}", read)


def _read_files(files: Sequence[Path], hub_set: HubSet) -> Iterator[RawRow]:
    for path in files:
        if path.suffix == ".parquet":
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000)
            values = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, value in enumerate(values, 1):
                yield RawRow(f"{path}, row {number}", value, hub_set)
            continue
        with _open_lines(path) as file:
            for number, line in enumerate(file, 1):
                text = line.removeprefix(BOM) if number == 1 else line
                if text.strip():
                    yield RawRow(f"{path}, line {number}", text, hub_set)


def _open_lines(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(
                f"{path}: reading .zst files needs the package zstandard. Run pip install "
                "zstandard, or decompress the file."
            ) from error
        reader = zstandard.ZstdDecompressor().stream_reader(
            path.open("rb"), read_across_frames=True
        )
        return io.BufferedReader(reader)
    return path.open("rb")
