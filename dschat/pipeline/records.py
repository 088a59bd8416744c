"""What a chain of steps knows of each: the command that began it, the one that has finished it, and its checkpoints.

The records, started.json and finished.json, lie in the output folder of a step.
"""

import contextlib
import json
import shutil
from pathlib import Path

from dschat.runtime.files import write_json
from dschat.runtime.lock import locked

STARTED, FINISHED = "started.json", "finished.json"
# Flags that may differ between a run and the one that goes on with it.
FREE = ("--output_dir", "--save_interval")


def finished_seconds(folder: Path, command: list[str]) -> float | None:
    """The seconds that the step took, where a command of the same settings has finished it."""
    record = _read(folder / FINISHED) or {}
    return record["seconds"] if record and not differences(record["command"], command) else None


def begin(folder: Path, command: list[str], *, later: list[Path], fresh: bool) -> list[str]:
    """Put the folders in order for `command`, the main of a step and its flags, which is about to run.

    Args:
        later: folders of the steps that start from its model: what they have done does not count any more.
        fresh: begin from the start, and delete what others left.

    Returns:
        The flags with which the main goes on, where it was begun with the same settings and did not finish.

    Raises:
        ValueError: another run writes to one of the folders, or a checkpoint would be lost that may be wanted.
    """
    with _all_locked([folder, *later]):
        finished, started = _read(folder / FINISHED), _read(folder / STARTED)
        before = finished["command"] if finished else started
        changed = differences(before, command) if before else []
        own = _last_checkpoint(folder)
        if not fresh:
            kept = own or next(filter(None, map(_last_checkpoint, later)), None)
            if changed and kept:
                raise ValueError(
                    f"{kept} is of a run with other settings, and would be lost: {'; '.join(changed)}. Give the settings of that "
                    "run, another --output-dir, or --fresh (with --step for one step alone) to begin anew."
                )
            if own and not before:
                raise ValueError(
                    f"{own} is of a run that cannot be gone on with: it was begun in another way, or a step before it has "
                    "run since. Give --fresh to begin anew, or another --output-dir."
                )
            if changed:
                print(f"  begins anew with other settings: {'; '.join(changed)}", flush=True)
        # A step that has finished is not gone on with: its checkpoints are of a model that is there.
        if fresh or finished:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            own = None
        write_json(folder / STARTED, command)
        for stale in (folder, *later):
            (stale / FINISHED).unlink(missing_ok=True)
        for stale in later:
            (stale / STARTED).unlink(missing_ok=True)
    return ["--resume", "latest"] if own else []


def finish(folder: Path, command: list[str], seconds: float, *, later: list[Path]) -> None:
    """Record that `command` has finished the step, and delete the checkpoints that `later` steps have of its old model.

    Raises:
        ValueError: another run writes to one of the later folders.
    """
    write_json(folder / FINISHED, {"command": command, "seconds": seconds})
    with _all_locked(later):
        for stale in later:
            if _last_checkpoint(stale):
                print(
                    f"  {stale / 'checkpoints'}: deleted, as it began from a model that has been trained anew",
                    flush=True,
                )
                shutil.rmtree(stale / "checkpoints", ignore_errors=True)


def differences(before: list[str], now: list[str]) -> list[str]:
    """Every flag that decides what comes out of a main and has another value in `now`, with both values."""
    old, new = _settings(before), _settings(now)
    return [
        f"{flag} was {old.get(flag, 'not given')} and is {new.get(flag, 'not given')}"
        for flag in {**old, **new}
        if flag not in FREE and old.get(flag) != new.get(flag)
    ]


def _settings(command: list[str]) -> dict[str, str]:
    """The flags of a main and their values; where its folder lies, or that of the main itself, makes no difference."""
    flags: dict[str, str] = {}
    flag = ""
    for word in command[1:]:
        if word.startswith("--"):
            flag, flags[word] = word, ""
        else:
            flags[flag] = f"{flags[flag]} {word}".strip()
    # OUTPUT/actor-models/SIZE: models and data of other steps lie below OUTPUT, too.
    root = str(Path(flags["--output_dir"]).parent.parent)
    return {flag: value.replace(f"{root}/", "") or "given" for flag, value in flags.items()}


def _last_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("checkpoints/step_*"), default=None)


def _read(file: Path):
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


@contextlib.contextmanager
def _all_locked(folders: list[Path]):
    """Inside, no run writes to those of the folders that are there.

    Raises:
        ValueError: one does.
    """
    with contextlib.ExitStack() as stack:
        for folder in filter(Path.is_dir, folders):
            try:
                stack.enter_context(locked(folder))
            except BlockingIOError as error:
                raise ValueError(
                    f"{folder}: {error}. Wait for its end, or give another --output-dir."
                ) from error
        yield
