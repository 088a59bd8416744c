"""The output folder of a run: checks, the lock that keeps other runs out, and run.json."""

import glob
import json
import os
from collections.abc import Iterable
from pathlib import Path

from dschat.config.parse import config_dict, step_title
from dschat.config.ppo_options import MODEL_FOLDERS
from dschat.models.export import model_files, repair_folder
from dschat.runtime import dist
from dschat.runtime.files import write_json
from dschat.runtime.hardware import hardware, versions
from dschat.runtime.lock import lock_folder

RECORD = "run.json"  # in every output folder, from the moment that a run has loaded its models


def prepare_output_dir(output_dir: str | None, *, step: str, below: Iterable[str] = ()) -> None:
    """Make the output folder, see that it can be written, and keep other runs from it until this process ends.

    What a run that was killed left half done beside it is put in order. Every process must call it.

    Args:
        step: the title of this step.
        below: folders in it that models will be saved to; none: it is itself the model's.

    Raises:
        ValueError: it cannot be written, holds a model that no run of this step wrote, or another run writes to it; names
            --output_dir.
    """
    if output_dir is None:
        return
    path = Path(output_dir).resolve()
    if path == Path.cwd():
        raise ValueError(
            f"--output_dir {output_dir}: this is the folder you are in, and a finished model takes the place of its folder. "
            "Give one below it."
        )
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long, say
        raise ValueError(
            f"--output_dir {output_dir}: not writable ({error.strerror}). Give another folder."
        ) from error
    if path.is_mount() or (path.exists() and not os.access(path.parent, os.W_OK)):
        raise ValueError(
            f"--output_dir {output_dir}: a finished model takes its name by a rename, which a mount point or a folder "
            "above that is not writable forbids. Give a folder below it."
        )
    fault = dist.first_fault(_taken(path, step, below) if dist.is_main() else "")
    if fault:
        raise ValueError(f"--output_dir {output_dir}: {fault}. Give another folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{dist.rank()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--output_dir {output_dir}: not writable ({error.strerror}). Give another folder."
        ) from error


def _other_model(path: Path, step: str, below: Iterable[str]) -> str:
    """Return why no model may be saved there, or "": one is there already that no run of this step wrote."""
    if _asides(path):  # an output folder that was being replaced, and is put in order later
        return ""
    if not (path / RECORD).exists():
        for folder in (path, *(path / name for name in below)):
            names = model_files(folder)
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                return f"{folder} holds a model that no run here has written ({shown}), and this run would replace it or its files"
    elif model_files(path):
        try:
            other = json.loads((path / RECORD).read_text(encoding="utf-8")).get("step", step)
        except (ValueError, AttributeError):  # no JSON, or no object
            return f"{RECORD} in it is damaged, and tells no longer whose model it holds"
        if other != step:
            return f'it holds the model of "{other}", and a run of "{step}" would replace it or its {RECORD}'
    return ""


def _asides(path: Path) -> list[Path]:
    """Return the former folder that a run left when it was killed while replacing it."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.old/{glob.escape(path.name)}"))


def _taken(path: Path, step: str, below: Iterable[str]) -> str:
    """Take the folder for this run and put it in order; returns why that cannot be, or ""."""
    try:
        fault = _other_model(path, step, below)
        if fault:
            return fault
        # A run that is alive holds the folder, or what was it a moment ago.
        for folder in [*([path] if path.is_dir() else []), *_asides(path)]:
            lock_folder(folder)
        for folder in (path, *(path / name for name in MODEL_FOLDERS)):
            repair_folder(folder)
        path.mkdir(parents=True, exist_ok=True)
        lock_folder(path)
    except BlockingIOError as error:
        return str(error)
    except OSError as error:
        return f"not writable ({error.strerror})"
    return ""


def record_run(config, output_dir: str | None, *, dtype: str, **facts) -> None:
    """Write run.json: the configuration, precision, processes, hardware and versions of this run."""
    if output_dir is None or not dist.is_main():
        return
    record = {
        "step": step_title(type(config)),
        "config": config_dict(config),
        "dtype": dtype,
        "processes": dist.world_size(),
        "hardware": hardware(),
        "versions": versions(),
        **facts,
    }
    write_json(Path(output_dir) / RECORD, record)
