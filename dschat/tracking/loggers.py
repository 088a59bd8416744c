"""Loggers beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio, MLflow and CSV.

Every logger gets the same metrics under the same names. A resumed run continues the same run in
each: its id is kept in loggers.json in the output folder. Only rank 0 opens loggers. The packages
are imported when they are used.
"""

import csv
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dschat.runtime import dist
from dschat.runtime.files import write_json, write_text
from dschat.runtime.log import logger

IDS = "loggers.json"
PROJECT = "dschat"
MOST_PARAMETER_CHARACTERS = 500  # MLflow refuses longer values


class Logger(Protocol):
    """A place that metrics go to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step."""

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write sampled answers, if the logger has tables or texts."""

    def close(self) -> None:
        """Finish the run."""


class TensorBoardLogger:
    """TensorBoard events in a folder."""

    def __init__(self, folder: str | Path, *, resume_from: int | None):
        """Open the folder; events after step `resume_from` are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_from is None else resume_from + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar for each metric."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, global_step=step)
        self._writer.flush()

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows as one text, indented so that Markdown shows it unchanged."""
        lines = [json.dumps(dict(row), ensure_ascii=False) for row in rows]
        self._writer.add_text("samples", "\n".join(f"    {line}" for line in lines), step)

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


class CsvLogger:
    """metrics.csv: one row a step, one column a metric; a metric without a value is empty."""

    def __init__(self, path: Path, *, resume_from: int | None):
        """Start the file, or continue it after step `resume_from`."""
        self._path = path
        self._columns = ["step"]
        rows: list[dict[str, str]] = []
        if resume_from is not None and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if int(row["step"]) <= resume_from]
                self._columns = list(reader.fieldnames or self._columns)
        self._rewrite(rows)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row; the file is written again if it needs a new column."""
        row = {"step": str(step)}
        row |= {key: repr(value) for key, value in values.items() if math.isfinite(value)}
        new = [key for key in values if key not in self._columns]
        if new:
            with open(self._path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self._columns += new
            self._rewrite([*rows, row])
            return
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing: the answers are in evaluation/."""

    def close(self) -> None:
        """Do nothing: every row is in the file."""

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        lines = _Lines()
        writer = csv.DictWriter(lines, self._columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._path, "".join(lines.found))


class _Lines:
    """A file that keeps what is written to it."""

    def __init__(self):
        self.found: list[str] = []

    def write(self, text: str) -> None:
        self.found.append(text)


class WandbLogger:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, *, ids: dict[str, str], name: str, config: dict, folder: str | None):
        """Start the run, or continue the one whose id is in `ids`."""
        import wandb

        self._wandb = wandb
        ids.setdefault("wandb", uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=ids["wandb"],
            name=name,
            dir=folder,
            config=config,
            resume="allow",
        )
        # An own axis: W&B drops rows whose step it has seen, as after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics and their step."""
        self._run.log({"step": step, **values})

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the rows as a table."""
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self._run.log({"step": step, "samples": self._wandb.Table(columns=columns, data=data)})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TrackioLogger:
    """A run of Trackio, which is kept on this machine unless TRACKIO_SPACE_ID is set."""

    def __init__(self, *, ids: dict[str, str], name: str, config: dict):
        """Start the run, or continue the one whose name is in `ids`."""
        import trackio

        self._trackio = trackio
        ids.setdefault("trackio", f"{name}-{uuid.uuid4().hex[:6]}")
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=ids["trackio"],
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            config=config,
            resume="allow",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics."""
        self._trackio.log(dict(values), step=step)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing: tables of Trackio need pandas; the answers are in evaluation/."""

    def close(self) -> None:
        """Finish the run."""
        self._trackio.finish()


class MlflowLogger:
    """A run of MLflow, on this machine unless MLFLOW_TRACKING_URI names a server."""

    def __init__(self, *, ids: dict[str, str], name: str, config: dict):
        """Start the run, or continue the one whose id is in `ids`."""
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        run = mlflow.start_run(run_id=ids.get("mlflow"), run_name=name)
        if "mlflow" not in ids:
            # Parameters cannot change, so a resumed run keeps those it began with.
            mlflow.log_params(
                {key: str(value)[:MOST_PARAMETER_CHARACTERS] for key, value in config.items()}
            )
        ids["mlflow"] = run.info.run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics."""
        self._mlflow.log_metrics(dict(values), step=step)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the rows as a JSON file of the run."""
        self._mlflow.log_dict(
            {"rows": [dict(row) for row in rows]}, f"samples/step_{step:06d}.json"
        )

    def close(self) -> None:
        """Finish the run."""
        self._mlflow.end_run()


def open_loggers(
    names: Sequence[str],
    *,
    output_dir: str | None,
    events: str,
    name: str,
    config: dict,
    resume_from: int | None,
) -> list[Logger]:
    """Open the loggers of a run on rank 0; other ranks have none.

    Args:
        names: from ``RunOptions.loggers``.
        output_dir: the output folder, for metrics.csv and the ids of runs.
        events: folder of the TensorBoard events.
        name: the run's name, if it is new.
        config: the flat configuration, shown with the run.
        resume_from: the step that the run continues after; None: it is new.

    Raises:
        ValueError: a logger cannot be opened; names --report_to.
    """
    if not dist.is_main() or not names:
        return []
    file = None if output_dir is None else Path(output_dir) / IDS
    ids = _read_ids(file) if resume_from is not None else {}
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(events, resume_from=resume_from),
        "csv": lambda: CsvLogger(Path(str(output_dir)) / "metrics.csv", resume_from=resume_from),
        "wandb": lambda: WandbLogger(ids=ids, name=name, config=config, folder=output_dir),
        "trackio": lambda: TrackioLogger(ids=ids, name=name, config=config),
        "mlflow": lambda: MlflowLogger(ids=ids, name=name, config=config),
    }
    if output_dir is not None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    found = []
    for kind in names:
        try:
            found.append(makers[kind]())
        except Exception as error:
            hint = " Without a login or network, set WANDB_MODE=offline." if kind == "wandb" else ""
            raise ValueError(
                f"--report_to {kind}: it cannot be opened ({type(error).__name__}: {error}).{hint} "
                "Leave it out of --report_to to run without it."
            ) from error
    if file is not None and ids:
        write_json(file, ids)
    return found


class Loggers:
    """Several loggers as one. One that fails is reported and left out; the run continues."""

    def __init__(self, loggers: Sequence[Logger]):
        """Set the loggers."""
        self._loggers = list(loggers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step to all."""
        self._each(lambda one: one.write(step, values))

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write sampled answers to all."""
        if rows:
            self._each(lambda one: one.write_samples(step, rows))

    def close(self) -> None:
        """Close all."""
        self._each(lambda one: one.close())

    def _each(self, action: Callable[[Logger], None]) -> None:
        for one in list(self._loggers):
            try:
                action(one)
            except Exception as error:  # a server, a network or a disk that fails
                self._loggers.remove(one)
                logger.warning(
                    f"{type(one).__name__.removesuffix('Logger')} gets no more metrics "
                    f"({type(error).__name__}: {error}); metrics.jsonl still has them"
                )


def _read_ids(file: Path | None) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
