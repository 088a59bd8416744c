"""Work on all rows of a data set, in forks of this process.

A fork has all modules and the opened data set already: it starts in milliseconds and shares the
memory that it does not change. It computes on the CPU only, without torch.
"""

import gc
import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TypeVar

from dschat.runtime.hardware import threads_per_rank

logger = logging.getLogger(__name__)

CHUNK_ROWS = 512
MIN_CHUNKS = 8  # fewer are done before forks would have started
MAX_FORKS = 8  # each takes some 60 MB
PROGRESS_S = 10.0

Result = TypeVar("Result")


def map_rows(
    function: Callable[[range], Result], num_rows: int, *, name: str, serial: bool = False
) -> Iterator[Result]:
    """Yield what `function` returns for each chunk of rows, in their order.

    The first error of a chunk is raised when its turn comes.

    Args:
        function: gets the numbers of the rows of a chunk. It runs in another process, and what it
            returns is pickled, unless there are few rows or `serial`.
        num_rows: of all chunks.
        name: what is done, for progress in the log, such as "rows.jsonl: checked".
        serial: do all in this process.
    """
    chunks = [
        range(begin, min(begin + CHUNK_ROWS, num_rows)) for begin in range(0, num_rows, CHUNK_ROWS)
    ]
    num_forks = min(MAX_FORKS, threads_per_rank(1))
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    results: Iterator[Result]
    if serial or not can_fork or num_forks == 1 or len(chunks) < MIN_CHUNKS:
        results = map(function, chunks)
    else:
        results = _map_in_forks(function, chunks, num_forks)
    begun = shown = time.monotonic()
    for chunk, result in zip(chunks, results, strict=True):
        yield result
        now = time.monotonic()
        if now - shown > PROGRESS_S:
            shown = now
            rest = (now - begun) * (num_rows - chunk.stop) / chunk.stop
            logger.info("%s %d of %d rows, %.0f s left", name, chunk.stop, num_rows, rest)


def _map_in_forks(
    function: Callable[[range], Result], chunks: list[range], num_forks: int
) -> Iterator[Result]:
    """Yield the results of `chunks`; fork n computes every `num_forks`-th of them from n on."""
    forks = []
    readers: list[Connection] = []
    try:
        for number in range(num_forks):
            reader, writer = multiprocessing.Pipe(duplex=False)
            readers.append(reader)
            fork = multiprocessing.get_context("fork").Process(
                target=_work,
                args=(function, chunks[number::num_forks], writer, readers),
                daemon=True,
            )
            with warnings.catch_warnings():  # other threads of this process are not used in it
                warnings.simplefilter("ignore", DeprecationWarning)
                fork.start()
            forks.append(fork)
            writer.close()
        for index in range(len(chunks)):
            yield _receive(readers[index % num_forks])
    finally:
        for reader in readers:
            reader.close()
        for fork in forks:
            fork.terminate()
            fork.join()


def _receive(reader: Connection):
    try:
        result, error = reader.recv()
    except EOFError:
        raise RuntimeError(
            "a process that reads the data has ended, perhaps for lack of host memory. Start "
            "again, or with fewer processes on this machine."
        ) from None
    if error is not None:
        raise error
    return result


def _work(
    function: Callable[[range], object],
    chunks: list[range],
    writer: Connection,
    readers: list[Connection],
) -> None:
    """Send the result or the error of each chunk. Ends when nobody reads them any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it, too, and ends its forks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Garbage collection would write to, and so copy, all memory that is shared with the parent.
    gc.freeze()
    for reader in readers:
        reader.close()
    try:
        for chunk in chunks:
            result, fault = None, None
            try:
                result = function(chunk)
            except Exception as error:  # raised again by the parent
                fault = error
            writer.send((result, fault))
    except BrokenPipeError:
        os._exit(1)
