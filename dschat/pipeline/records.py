"""Records of the steps of a pipeline: the command that started each, and the one that finished it.

started.json and finished.json are in the output folder of a step, beside its checkpoints.
"""

import contextlib
import json
import shutil
from pathlib import Path

from dschat.runtime.files import write_json
from dschat.runtime.lock import locked

STARTED = "started.json"
FINISHED = "finished.json"
# A run may be resumed with other values of these flags.
FLAGS_FREE_TO_CHANGE = ("--fit", "--output_dir", "--report_to", "--save_interval", "--max_restarts")


def finished_seconds(folder: Path, command: list[str]) -> float | None:
    """Return the seconds that the step took if it finished with the same settings, else None."""
    record = _read(folder / FINISHED) or {}
    if record and not differences(record["command"], command):
        return record["seconds"]
    return None


def begin(folder: Path, command: list[str], *, later: list[Path], fresh: bool) -> list[str]:
    """Prepare the folders for a step that is about to run.

    Args:
        folder: the step's output folder.
        command: the step's main and its flags.
        later: folders of the steps that start from this step's model. They have to run again.
        fresh: start from the beginning, and delete the checkpoints of earlier runs.

    Returns:
        The flags that resume the step, if it was started with the same settings and did not
        finish; else an empty list.

    Raises:
        ValueError: another run writes to one of the folders, or a checkpoint would be lost that may
            still be wanted.
    """
    with _all_locked([folder, *later]):
        finished = _read(folder / FINISHED)
        started = _read(folder / STARTED)
        before = finished["command"] if finished else started
        changed = differences(before, command) if before else []
        own = _last_checkpoint(folder)
        if not fresh:
            kept = own or next(filter(None, map(_last_checkpoint, later)), None)
            if changed and kept:
                raise ValueError(
                    f"{kept} belongs to a run with other settings and would be lost: "
                    f"{'; '.join(changed)}. Give the settings of that run, another --output-dir, "
                    "or --fresh (with --step for one step only) to start from the beginning."
                )
            if own and not before:
                raise ValueError(
                    f"{own} belongs to a run that cannot be resumed: it was started in another "
                    "way, or an earlier step has run again since. Give --fresh to start from the "
                    "beginning, or another --output-dir."
                )
            if changed:
                print(f"  starts over with other settings: {'; '.join(changed)}", flush=True)
        # A finished step is not resumed: its model is saved, its checkpoints are no longer needed.
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
    """Record that `command` has finished the step.

    Checkpoints of `later` steps started from the step's old model and are deleted.

    Raises:
        ValueError: another run writes to one of the later folders.
    """
    write_json(folder / FINISHED, {"command": command, "seconds": seconds})
    with _all_locked(later):
        for stale in later:
            if _last_checkpoint(stale):
                print(
                    f"  {stale / 'checkpoints'}: deleted; the model it started from has been "
                    "trained again",
                    flush=True,
                )
                shutil.rmtree(stale / "checkpoints", ignore_errors=True)


def differences(before: list[str], now: list[str]) -> list[str]:
    """Return a description of each flag that affects the result and differs in `now`."""
    old = _settings(before)
    new = _settings(now)
    found = []
    for flag in {**old, **new}:
        if flag not in FLAGS_FREE_TO_CHANGE and old.get(flag) != new.get(flag):
            was = old.get(flag, "not given")
            found.append(f"{flag} was {was} and is {new.get(flag, 'not given')}")
    return found


def _settings(command: list[str]) -> dict[str, str]:
    """Return the flags of a main and their values, without the location of the output folder."""
    flags: dict[str, str] = {}
    flag = ""
    for word in command[1:]:
        if word.startswith("--"):
            flag = word
            flags[flag] = ""
        else:
            flags[flag] = f"{flags[flag]} {word}".strip()
    # Models and data of other steps are in the same tree: OUTPUT/actor-models/SIZE.
    root = str(Path(flags["--output_dir"]).parent.parent)
    return {flag: value.replace(f"{root}/", "") or "given" for flag, value in flags.items()}


def _last_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("checkpoints/step_*"), default=None)


def _read(file: Path):
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


@contextlib.contextmanager
def _all_locked(folders: list[Path]):
    """Lock those of the folders that exist.

    Raises:
        ValueError: another run writes to one of them.
    """
    with contextlib.ExitStack() as stack:
        for folder in filter(Path.is_dir, folders):
            try:
                stack.enter_context(locked(folder))
            except BlockingIOError as error:
                raise ValueError(
                    f"{folder}: {error}. Wait until it ends, or give another --output-dir."
                ) from error
        yield
