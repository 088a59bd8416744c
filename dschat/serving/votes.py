"""Votes on answers, written as preference pairs that step 2 reads.

``preferences.jsonl`` holds one pair a line: prompt, chosen, rejected, and beside them the vote, the
models and the settings. Votes without a winner (a tie, or all bad) are no pairs and are written to
``undecided.jsonl``.
"""

import fcntl
import json
import os
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dschat.runtime.paths import user_path

PREFERENCES = "preferences.jsonl"
UNDECIDED = "undecided.jsonl"
NO_WINNER = ("tie", "bad")


@dataclass(frozen=True)
class Voted:
    """An answer that was voted on."""

    model: str  # its name in --models
    path: str
    text: str
    score: float | None = None  # of the reward model
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Vote:
    """A vote on two or more answers to one prompt."""

    prompt: str | list[dict]  # a string continues as it is; messages are a conversation
    answers: tuple[Voted, ...]  # from left to right
    best: int | str  # the number of the best answer, "tie" or "bad"


def vote_lines(vote: Vote, *, at: str) -> list[dict]:
    """Return the lines of a vote: a pair for each answer that lost, or one line without a winner.

    Args:
        vote: the vote.
        at: the time, as it is written.
    """
    if vote.best in NO_WINNER:
        answers = [asdict(answer) for answer in vote.answers]
        return [{"prompt": vote.prompt, "answers": answers, "vote": vote.best, "time": at}]
    chosen = vote.answers[int(vote.best)]
    lines = []
    for rejected in vote.answers:
        if rejected.text == chosen.text:
            continue
        sides = {"chosen": asdict(chosen), "rejected": asdict(rejected)}
        texts = {name: side.pop("text") for name, side in sides.items()}
        lines.append({"prompt": vote.prompt, **texts, "answers": sides, "time": at})
    return lines


class VoteFiles:
    """The files of votes in a folder, to which one process writes.

    Args:
        folder: made if it is missing.

    Raises:
        ValueError: another process writes there, the folder cannot be written, or a file ends in
            the middle of a line.
    """

    def __init__(self, folder: str):
        self.folder = user_path(folder)
        self._turn = threading.Lock()
        self._files: dict[str, int] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (PREFERENCES, UNDECIDED):
                self._files[name] = _open_lines(self.folder / name)
        except OSError as error:
            self.close()
            raise ValueError(
                f"--votes {folder} cannot be written: {error}. Give another folder."
            ) from error
        except ValueError:
            self.close()
            raise

    def add(self, vote: Vote) -> int:
        """Append a vote, whole or not at all, and return the number of its preference pairs.

        Raises:
            OSError: the disk refused the lines.
        """
        lines = vote_lines(vote, at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        has_winner = vote.best not in NO_WINNER
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self._turn:
            _append(self._files[PREFERENCES if has_winner else UNDECIDED], text.encode())
        return len(lines) if has_winner else 0

    def close(self) -> None:
        """Close the files, which ends their locks."""
        while self._files:
            os.close(self._files.popitem()[1])


def _open_lines(path: Path) -> int:
    """Open a file of lines for appending, under a lock, and return its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"--votes: another server writes to {path}. End it, or give another folder."
        ) from None
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.close(descriptor)
        raise ValueError(
            f"--votes: the last line of {path} is incomplete. Complete or remove it, and end the "
            "file with a line break."
        )
    return descriptor


def _append(descriptor: int, data: bytes) -> None:
    """Append all of `data` and wait until the disk has it, or leave the file as it was."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, data)
        if written < len(data):
            raise OSError(f"only {written} of {len(data)} bytes were written")
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise
