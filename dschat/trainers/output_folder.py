"""The output folder of a run: checks, the lock that keeps other runs out, and run.json."""

import glob
import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from dschat.config.parse import config_dict, step_title
from dschat.config.ppo_options import MODEL_FOLDERS
from dschat.models.export import model_files, repair_folder
from dschat.report.model_card import CARD, is_classifier, write_model_card
from dschat.report.page import write_report
from dschat.report.run_files import read_run
from dschat.runtime import dist, supervisor
from dschat.runtime.files import write_json
from dschat.runtime.hardware import hardware, versions
from dschat.runtime.lock import lock_folder
from dschat.runtime.log import logger
from dschat.runtime.run_record import RECORD
from dschat.tracking.loggers import open_loggers
from dschat.tracking.metrics import MetricsWriter


def prepare_output_dir(output_dir: str | None, *, step: str, below: Iterable[str] = ()) -> None:
    """Create the output folder, check that it is writable, and lock it until this process ends.

    A save that a killed run left unfinished is completed or undone. Every rank must call it.

    Args:
        output_dir: the value of --output_dir; None: do nothing.
        step: the title of this step.
        below: folders in it that models are saved to; empty: models are saved to it directly.

    Raises:
        ValueError: it is not writable, it holds a model that no run of this step wrote, or another
            run uses it; names --output_dir.
    """
    if output_dir is None:
        return
    path = Path(output_dir).resolve()
    if path == Path.cwd():
        raise ValueError(
            f"--output_dir {output_dir}: this is the current folder, and a finished model replaces "
            "its folder. Give a folder below it."
        )
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # for example, the name is too long
        raise ValueError(
            f"--output_dir {output_dir}: not writable ({error.strerror}). Give another folder."
        ) from error
    if path.is_mount() or (path.exists() and not os.access(path.parent, os.W_OK)):
        raise ValueError(
            f"--output_dir {output_dir}: a finished model is moved here by a rename, which fails "
            "for a mount point or if the folder above is not writable. Give a folder below it."
        )
    fault = dist.first_fault(_lock_and_repair(path, step, below) if dist.is_main() else "")
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
    """Return a message if the folder holds a model that no run of this step wrote; else ""."""
    if _former_folders(path):  # a killed run was replacing this folder; it is repaired later
        return ""
    if not (path / RECORD).exists():
        for folder in (path, *(path / name for name in below)):
            names = model_files(folder)
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                return (
                    f"{folder} holds a model that no training run wrote ({shown}), and this run "
                    "would replace it or some of its files"
                )
    elif model_files(path):
        try:
            other = json.loads((path / RECORD).read_text(encoding="utf-8")).get("step", step)
        except (ValueError, AttributeError):  # no JSON, or no object
            return f"its {RECORD} is damaged and does not show which step wrote its model"
        if other != step:
            return (
                f'it holds the model of "{other}", and a run of "{step}" would replace it or its '
                f"{RECORD}"
            )
    return ""


def _former_folders(path: Path) -> list[Path]:
    """Return the previous version of a folder, if a run was killed while replacing it."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.old/{glob.escape(path.name)}"))


def _lock_and_repair(path: Path, step: str, below: Iterable[str]) -> str:
    """Lock the folder for this run and repair it; return what prevents that, or ""."""
    try:
        fault = _other_model(path, step, below)
        if fault:
            return fault
        # A running process may hold the lock of the folder, or of its previous version while
        # replacing it.
        held = [path] if path.is_dir() else []
        held += _former_folders(path)
        for folder in held:
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


def open_metrics(config, *, number: int, resume_from: int | None) -> MetricsWriter:
    """Open metrics.jsonl and the loggers of --report_to.

    Args:
        config: of the run.
        number: of the step.
        resume_from: the update or rollout that the run continues after; None: it is new.

    Raises:
        ValueError: a logger cannot be opened; names --report_to.
    """
    run = config.run
    name = Path(run.output_dir).resolve().name if run.output_dir else "run"
    loggers = open_loggers(
        run.loggers,
        output_dir=run.output_dir,
        events=f"{run.tensorboard_path}/step{number}_tensorboard_logs",
        name=f"{name}-step{number}",
        config=config_dict(config),
        resume_from=resume_from,
    )
    return MetricsWriter(run.output_dir, loggers=loggers, resume_from=resume_from)


def write_pages(output_dir: str | None) -> None:
    """Write report.html, and a model card beside each saved model; only rank 0 does.

    The models are saved by then, so a fault is logged and does not end the run.
    """
    if output_dir is None or not dist.is_main():
        return
    folder = Path(output_dir)
    try:
        run = read_run(folder)
        for place in (folder, *(folder / name for name in MODEL_FOLDERS)):
            if (place / "config.json").exists() and not write_model_card(place, run):
                logger.info(f"{place / CARD} is kept: dschat did not write it")
        logger.info(f"report: {write_report(folder)}")
        logger.info(f"next: {_next_command(folder)}")
    except Exception as error:
        logger.warning(
            f"no report was written ({type(error).__name__}: {error}). Once this is repaired, "
            f"python -m dschat.report {output_dir} writes it."
        )


def _next_command(folder: Path) -> str:
    """Return the command that tries the model of a finished run."""
    actor = folder / MODEL_FOLDERS[0]
    model = actor if (actor / "config.json").exists() else folder
    if is_classifier(model):
        main = "training/step2_reward_model_finetuning/rw_eval.py"
        return f"python {main} --model_name_or_path {shlex.quote(str(model))}"
    return f"python inference/chat.py --path {shlex.quote(str(model))}"


def record_run(config, output_dir: str | None, *, dtype: str, **facts) -> None:
    """Write run.json: configuration, precision, world size, hardware and versions of this run.

    Args:
        config: of the run.
        output_dir: where to; None: do nothing.
        dtype: "fp16", "bf16" or "fp32".
        facts: further entries.
    """
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
    restarts = _earlier_restarts(Path(output_dir))
    if restarts and (facts.get("resumed_from") is not None or supervisor.is_restarted()):
        record["restarts"] = restarts
    write_json(Path(output_dir) / RECORD, record)


def _earlier_restarts(folder: Path) -> list:
    """Return the faults that a supervisor has recorded in the run.json of a folder."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("restarts", [])
    except (OSError, ValueError, AttributeError):
        return []
    return found if isinstance(found, list) else []
