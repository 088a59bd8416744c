"""The state that a run needs to continue as if it had never stopped, saved and restored between updates.

The main finds the checkpoint before any model loads (``find_checkpoint``), builds everything as at the start, and
hands it to ``RunState``; the loop takes its batches from there and reports every step.
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from dschat.checkpoint.run_checkpoint import (
    Checkpoint,
    delete_newer,
    is_shared,
    last_step,
    newest_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from dschat.config.parse import config_dict
from dschat.runtime import dist
from dschat.runtime.interrupt import Interruption, PeerWatch
from dschat.runtime.log import Stopped, logger
from dschat.runtime.paths import user_path
from dschat.runtime.seeds import random_state, seed_everything, set_random_state
from dschat.tracking.metrics import MetricsWriter

# Flags that may differ between a run and its resumption: they change neither the numbers nor the model.
FREE = {
    *(
        "output_dir",
        "resume",
        "save_interval",
        "save_total_limit",
        "log_interval_s",
        "local_rank",
        "data_output_path",
    ),
    *(
        "print_loss",
        "print_answers",
        "print_answers_interval",
        "enable_tensorboard",
        "tensorboard_path",
    ),
    *("deepspeed", "deepscale", "trust_remote_code", "ignore_memory_plan"),
}
# With another number of processes these have to change, such that a step's rows stay as many; see ``_check_rows``.
FREE_WITH_PROCESSES = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"),
    *("per_device_generation_batch_size", "per_device_training_batch_size", "generation_batches"),
}


class Stateful(Protocol):
    """A part of a run that changes as it goes."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Its tensors, and the rest as JSON; of this process alone."""

    def restore(self, saved: "Saved") -> None:
        """Restore the state that ``state`` returned."""


class Saved:
    """One part's state in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self.checkpoint, self.name = checkpoint, name

    @property
    def same_processes(self) -> bool:
        """Whether as many ranks wrote it; otherwise no rank's state belongs to one of today's."""
        return self.checkpoint.processes == dist.world_size()

    def of_rank(self, rank: int | None = None) -> tuple[dict[str, torch.Tensor], dict]:
        """Return the tensors and values that `rank` (default: this one) saved."""
        tensors, values = self.checkpoint.rank_state(rank)
        prefix = f"{self.name}/"
        own = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        return own, values[self.name]


def checkpoint_root(output_dir: str) -> Path:
    """The folder of a run's checkpoints."""
    return Path(output_dir) / "checkpoints"


def find_checkpoint(config) -> Checkpoint | None:
    """The checkpoint that --resume asks for, or None where the run starts from the beginning.

    Every process must call it, before any model loads.

    Raises:
        ValueError: --resume names no whole checkpoint, or one of a run with other flags; or --output_dir holds
            checkpoints, and --resume is not given or names one from elsewhere; or processes see different folders.
    """
    run = config.run
    if run.output_dir is None:
        return None
    if (run.save_interval or run.resume) and not is_shared(Path(run.output_dir)):
        raise ValueError(
            f"--output_dir {run.output_dir} is not the same folder for all processes, and a checkpoint is written by all of "
            "them. Give one on a file system that all hosts share, or leave --save_interval and --resume out: the finished "
            "model is written by the first process alone."
        )
    root = checkpoint_root(run.output_dir)
    if run.resume is None:
        step = last_step(root)
        if step is not None:
            raise ValueError(
                f"--output_dir {run.output_dir} holds checkpoints up to step {step}. Give --resume latest to continue from "
                f"there, another --output_dir, or delete {root} to start again."
            )
        return None
    if run.resume == "latest":
        checkpoint = newest_checkpoint(root)
        if checkpoint is None:
            logger.warning(
                f"--resume latest: no whole checkpoint in {root}, so the run starts from the beginning"
            )
            return None
    else:
        try:
            checkpoint = open_checkpoint(user_path(run.resume))
        except ValueError as error:
            raise ValueError(
                f"--resume {run.resume}: {error} Give latest, or the folder of a whole one."
            ) from error
        step = last_step(root)
        if step is not None and checkpoint.path.resolve().parent != root.resolve():
            raise ValueError(
                f"--resume {run.resume} is of another folder, and --output_dir {run.output_dir} holds checkpoints of its own, "
                f"up to step {step}, which would be lost. Give another --output_dir, or --resume latest."
            )
    _check_flags(config, checkpoint)
    return checkpoint


class RunState:
    """Saves a run between two steps, and restores it."""

    def __init__(
        self, config, *, loader, window: int, engines: dict[str, object], metrics: MetricsWriter
    ):
        """
        Args:
            loader: of training rows; its sampler has ``set_epoch(epoch, start=)``.
            window: its batches in a step.
            engines: those that train, by name.
        """
        self.config, self.engines, self.metrics = config, engines, metrics
        self.loader, self.window = loader, window
        self.parts: dict[str, Stateful] = {}
        self.facts: dict = {}
        self.step = 0  # steps that are done
        self._saved_step = 0  # of them, how many a checkpoint holds
        self._restored: Checkpoint | None = None
        self._interruption = Interruption()
        self._peers = PeerWatch()

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader) // self.window

    @property
    def _window_rows(self) -> int:
        """Rows of a step, of all processes."""
        return self.loader.batch_size * self.window * dist.world_size()

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Take the state of `checkpoint`, where there is one; its random numbers wait for the first batch."""
        if checkpoint is None:
            return
        self._check_rows(checkpoint)
        checkpoint.load_engines(self.engines)
        for name, part in self.parts.items():
            part.restore(Saved(checkpoint, name))
        self.step = self._saved_step = checkpoint.step
        self._restored = checkpoint
        if self.config.run.output_dir is not None:
            delete_newer(checkpoint_root(self.config.run.output_dir), checkpoint.step)
        dist.barrier()
        logger.info(f"resuming after step {checkpoint.step}, from {checkpoint.path}")

    def windows(self) -> Iterator[list]:
        """The batches of each further step, epoch after epoch without end."""
        while True:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            self.loader.sampler.set_epoch(epoch, start=done * self.window * self.loader.batch_size)
            # A loader's iterator draws a random number when it is made. At the beginning of an epoch that is still to
            # come; in the middle of one the checkpoint already has it.
            if done == 0:
                self._restore_random()
            batches = iter(self.loader)
            self._restore_random()
            for _ in range(done, self.steps_per_epoch):
                yield [next(batches) for _ in range(self.window)]

    def __enter__(self) -> "RunState":
        self._interruption.__enter__()
        self._peers.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._peers.__exit__(*error)
        self._interruption.__exit__(*error)

    def end_step(self, *, last: bool) -> None:
        """A step is done and its metrics are written: save if it is time to, and stop if that was asked for.

        Args:
            last: the run is over, so that it no longer stops for a signal.

        Raises:
            Stopped: a signal came; the state is saved.
        """
        self.step += 1
        run = self.config.run
        received = 0 if last else self._interruption.agreed()
        is_due = run.save_interval and self.step % run.save_interval == 0
        saved = run.output_dir is not None and (is_due or received) and self._save()
        if received:
            name = signal.Signals(received).name
            what = (
                "checkpoint saved; rerun the same command with --resume latest to continue"
                if saved
                else "nothing is saved without --output_dir"
                if run.output_dir is None
                else "it could not be saved (see above)"
            )
            raise Stopped(f"{name} after step {self.step}: {what}.", status=128 + received)

    def save_unfinished(self) -> bool:
        """Save the whole steps of a run that cannot continue; every process must call it. False where it was not possible."""
        if self.config.run.output_dir is None:
            return False
        return 0 < self._saved_step == self.step or self._save()

    def _save(self) -> bool:
        tensors, state = random_state()
        tensors = {f"random/{key}": value for key, value in tensors.items()}
        values = {"random": state}
        for name, part in self.parts.items():
            own, values[name] = part.state()
            tensors |= {f"{name}/{key}": value for key, value in own.items()}
        facts = {
            "step": self.step,
            "processes": dist.world_size(),
            "rows": len(self.loader.dataset),
            "data": getattr(self.loader.dataset, "items_digest", None),
            "window_rows": self._window_rows,
            "config": config_dict(self.config),
            **self.facts,
        }
        self.metrics.sync()
        saved = save_checkpoint(
            checkpoint_root(self.config.run.output_dir),
            self.step,
            engines=self.engines,
            facts=facts,
            tensors=tensors,
            state=values,
            keep=self.config.run.save_total_limit,
        )
        self._saved_step = self.step if saved else self._saved_step
        return saved

    def _restore_random(self) -> None:
        if self._restored is None:
            return
        saved = Saved(self._restored, "random")
        self._restored = None
        if saved.same_processes:
            set_random_state(*saved.of_rank())
        else:
            # No rank's numbers to continue with: others than at the start, and others on each process.
            seed_everything(self.config.run.seed + 1_000_003 * self.step + dist.rank())

    def _check_rows(self, checkpoint: Checkpoint) -> None:
        """
        Raises:
            ValueError: the training data or a step's number of rows is another.
        """
        facts = checkpoint.facts
        if facts["rows"] != len(self.loader.dataset):
            raise ValueError(
                f"--resume {self.config.run.resume}: the run had {facts['rows']} training rows, and --data_path and "
                f"--data_split now give {len(self.loader.dataset)}. Give the data of that run."
            )
        before = facts.get("data")  # not in checkpoints of earlier versions
        now = getattr(self.loader.dataset, "items_digest", None)
        if before is not None and now is not None and before != now:
            raise ValueError(
                f"--resume {self.config.run.resume}: the run had as many training rows, but their content or order has "
                "changed since, in the files of --data_path or in the tokenizer. Give the data and the tokenizer of that run."
            )
        if facts["window_rows"] != self._window_rows:
            raise ValueError(
                f"--resume {self.config.run.resume}: a step of that run had {facts['window_rows']} rows "
                f"({facts['processes']} processes), and now has {self._window_rows} ({dist.world_size()} processes x "
                f"{self.loader.batch_size} rows x {self.window} batches). Change batch size or number of batches, such "
                "that the product is the same."
            )


def _check_flags(config, checkpoint: Checkpoint) -> None:
    before, now = checkpoint.facts["config"], config_dict(config)
    free = FREE | (FREE_WITH_PROCESSES if checkpoint.processes != dist.world_size() else set())
    changed = [
        f"--{name} was {before.get(name)} and is {value}"
        for name, value in now.items()
        if name not in free and before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"--resume {config.run.resume}: {checkpoint.path} is of a run with other flags: {'; '.join(changed)}. "
            "Give the flags of that run (its run.json holds them), or start a new one in another --output_dir."
        )
