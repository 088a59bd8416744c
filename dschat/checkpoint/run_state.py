"""The state that a run needs to continue as if it had never stopped.

The main looks for a checkpoint before any model loads (``find_checkpoint``), builds everything as
at the start and hands it to ``RunState``. The training loop takes its batches from there and
reports every update (steps 1, 2 and DPO) or rollout (step 3).
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from dschat.checkpoint.background import BackgroundSaves
from dschat.checkpoint.run_checkpoint import (
    Checkpoint,
    checkpoint_folder,
    copy_checkpoint,
    delete_newer,
    is_shared,
    last_step,
    newest_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from dschat.config.parse import config_dict, default_dict
from dschat.config.ppo import PPOConfig
from dschat.runtime import dist, heartbeat
from dschat.runtime.grace import report_update
from dschat.runtime.interrupt import Interruption, PeerWatch
from dschat.runtime.log import Stopped, logger
from dschat.runtime.paths import user_path
from dschat.runtime.seeds import random_state, seed_everything, set_random_state
from dschat.tracking.callbacks import Callbacks
from dschat.tracking.metrics import MetricsWriter

# Flags that may differ when a run is resumed: they change neither the numbers nor the model.
CHANGEABLE_FLAGS = {
    "background_save",
    "data_output_path",
    "deepscale",
    "deepspeed",
    "enable_tensorboard",
    "fit",
    "hang_timeout_s",
    "ignore_memory_plan",
    "local_rank",
    "log_interval_s",
    "max_restarts",
    "on_reward_error",  # a run that stopped on an error may continue without stopping
    "output_dir",
    "print_answers",
    "print_answers_interval",
    "print_loss",
    "report_to",
    "restart_delay_s",
    "resume",
    "reward_timeout_s",
    "reward_workers",
    "save_interval",
    "save_rollouts",
    "save_total_limit",
    "tensorboard_path",
    "trust_remote_code",
}
# Flags that have to change with the number of ranks, to keep the rows of an update or rollout the
# same; see ``RunState._check_rows``.
BATCH_SIZE_FLAGS = {
    "generation_batches",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "per_device_generation_batch_size",
    "per_device_train_batch_size",
    "per_device_training_batch_size",
}


# Seconds that a run which has failed waits for a checkpoint that is being written.
LAST_SAVE_S = 60.0


class Stateful(Protocol):
    """A part of a run whose state changes during training."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Return the state of this rank: tensors, and the rest as JSON."""

    def restore(self, saved: "SavedState") -> None:
        """Restore the state that ``state`` returned."""


class SavedState:
    """The state of one part of a run in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        """Select the part `name` of `checkpoint`."""
        self.checkpoint = checkpoint
        self.name = name

    @property
    def same_processes(self) -> bool:
        """True if as many ranks saved it as there are now; otherwise ranks do not correspond."""
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
    """Return the folder of a run's checkpoints."""
    return Path(output_dir) / "checkpoints"


def find_checkpoint(config) -> Checkpoint | None:
    """Return the checkpoint that --resume names, or None if the run starts from the beginning.

    Every rank must call it, before any model loads.

    Raises:
        ValueError: --resume names no whole checkpoint, or one of a run with other flags; or
            --output_dir holds checkpoints, and --resume is missing or names one from elsewhere; or
            the folder of checkpoints is not writable; or ranks see different folders.
    """
    run = config.run
    if run.output_dir is None:
        return None
    if (run.save_interval or run.resume) and not is_shared(Path(run.output_dir)):
        raise ValueError(
            f"--output_dir {run.output_dir} is not the same folder on all ranks, and all of them "
            "write to a checkpoint. Give a folder on a file system that all hosts share, or leave "
            "out --save_interval and --resume: rank 0 alone writes the finished model."
        )
    root = checkpoint_root(run.output_dir)
    is_locked = root.is_dir() and not os.access(root, os.W_OK | os.X_OK)
    if dist.first_fault("not writable" if is_locked else ""):
        raise ValueError(
            f"--output_dir {run.output_dir}: its folder {root.name} is not writable. Make it "
            "writable, or give another --output_dir."
        )
    if run.resume is None:
        step = last_step(root)
        if step is not None:
            raise ValueError(
                f"--output_dir {run.output_dir} holds checkpoints up to "
                f"{unit_name(config)} {step}. Give --resume latest to continue from there, give "
                f"another --output_dir, or delete {root} to start again."
            )
        return None
    if run.resume == "latest":
        checkpoint = newest_checkpoint(root)
        if checkpoint is None:
            logger.warning(
                f"--resume latest: {root} holds no whole checkpoint, "
                "so the run starts from the beginning"
            )
            return None
    else:
        try:
            checkpoint = open_checkpoint(user_path(run.resume))
        except ValueError as error:
            raise ValueError(
                f"--resume {run.resume}: {error} Give latest, or the folder of a whole checkpoint."
            ) from error
        step = last_step(root)
        if step is not None and checkpoint.path.resolve().parent != root.resolve():
            raise ValueError(
                f"--resume {run.resume} is in another folder, and --output_dir {run.output_dir} "
                f"holds other checkpoints, up to {unit_name(config)} {step}, which would be lost. "
                "Give another --output_dir, or --resume latest."
            )
    _check_flags(config, checkpoint)
    return checkpoint


def saved_dtype(checkpoint: Checkpoint | None) -> str | None:
    """Return the precision of the run that saved `checkpoint`; None if it does not say."""
    return checkpoint.facts.get("dtype") if checkpoint else None


def unit_name(config) -> str:
    """Return what a run counts, as a word: "rollout" for step 3, "update" for the others."""
    return "rollout" if isinstance(config, PPOConfig) else "update"


class RunState:
    """Saves a run between two updates (steps 1, 2 and DPO) or rollouts (step 3), and restores it.

    ``step`` counts them; see ``unit_name``.
    """

    def __init__(
        self,
        config,
        *,
        loader,
        window: int,
        engines: dict[str, object],
        metrics: MetricsWriter,
        callbacks: Callbacks | None = None,
    ):
        """Start before the first update or rollout.

        Args:
            config: of the run.
            loader: of training rows; its sampler has ``set_epoch(epoch, start=)``.
            window: batches of the loader in an update or rollout.
            engines: those that train, by name.
            metrics: written to disk before a checkpoint is saved.
            callbacks: called by the training loop, and after a checkpoint is saved.
        """
        self.config = config
        self.engines = engines
        self.metrics = metrics
        self.callbacks = callbacks or Callbacks()
        self.loader = loader
        self.window = window
        self.unit = unit_name(config)
        self.parts: dict[str, Stateful] = {}
        self.facts: dict = {}
        # Hashes by flag, besides that of the training rows. Other texts are refused on resume,
        # other programs are only reported: a reward may have been repaired.
        self.texts: dict[str, str] = {}
        self.programs: dict[str, str] = {}
        self.step = 0  # updates or rollouts that are done
        self._saved_step = 0  # `step` of the newest checkpoint
        self._restored: Checkpoint | None = None
        self._step_began = 0.0
        self._interruption = Interruption()
        self._peers = PeerWatch()
        self._background: BackgroundSaves | None = None
        self._copied_step = 0  # `step` of the newest copy that is to become a checkpoint

    @property
    def steps_per_epoch(self) -> int:
        """Updates or rollouts in an epoch; a rest of batches that fills no window is dropped."""
        return len(self.loader) // self.window

    @property
    def _window_rows(self) -> int:
        """Rows of an update or rollout, over all ranks."""
        return self.loader.batch_size * self.window * dist.world_size()

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Restore the state of `checkpoint`; None: do nothing.

        Random number generators are restored later, with the first batch.
        """
        if checkpoint is None:
            return
        self._check_rows(checkpoint)
        self._check_texts_and_programs(checkpoint)
        checkpoint.load_engines(self.engines)
        for name, part in self.parts.items():
            part.restore(SavedState(checkpoint, name))
        self.step = self._saved_step = checkpoint.step
        self._restored = checkpoint
        if self.config.run.output_dir is not None:
            delete_newer(checkpoint_root(self.config.run.output_dir), checkpoint.step)
        dist.barrier()
        logger.info(f"resuming after {self.unit} {checkpoint.step}, from {checkpoint.path}")

    def windows(self) -> Iterator[list]:
        """Yield the batches of each further update or rollout, epoch after epoch without end."""
        while True:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            self.loader.sampler.set_epoch(epoch, start=done * self.window * self.loader.batch_size)
            # Creating the iterator of a loader draws a random number. A checkpoint between two
            # epochs was saved before that draw, one within an epoch after it.
            if done == 0:
                self._restore_random()
            batches = iter(self.loader)
            self._restore_random()
            for _ in range(done, self.steps_per_epoch):
                yield [next(batches) for _ in range(self.window)]

    def __enter__(self) -> "RunState":
        self._step_began = time.monotonic()
        if self.config.run.background_save:
            self._background = BackgroundSaves()
        self._beat()
        self._interruption.__enter__()
        self._peers.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if not isinstance(error[1], KeyboardInterrupt):
            self._wait_for_save(None if error[1] is None else LAST_SAVE_S)
        self._peers.__exit__(*error)
        self._interruption.__exit__(*error)

    def end_step(self, *, last: bool) -> None:
        """Count an update or rollout whose metrics are written; save if due, and stop if signalled.

        Args:
            last: the run is over and no longer stops for a signal.

        Raises:
            Stopped: a signal was received; the state has been saved if possible.
        """
        self.step += 1
        report_update(time.monotonic() - self._step_began)
        self._beat()
        run = self.config.run
        received = 0 if last else self._interruption.agreed()
        is_due = run.save_interval and self.step % run.save_interval == 0
        saved = False
        if run.output_dir is not None and (is_due or received):
            saved = self._save(in_background=not (received or last))
        if received:
            if saved:
                outcome = (
                    "Checkpoint saved; rerun the same command with --resume latest to continue."
                )
            elif run.output_dir is None:
                outcome = "No checkpoint saved; that needs --output_dir."
            else:
                outcome = "The checkpoint could not be saved (see above)."
            name = signal.Signals(received).name
            raise Stopped(
                f"Received {name} after {self.unit} {self.step}. {outcome}", status=128 + received
            )
        self._step_began = time.monotonic()

    def save_unfinished(self) -> bool:
        """Save the finished rollouts of a run that cannot continue. Every rank must call it.

        Returns:
            True if a checkpoint holds them; False if it could not be saved.
        """
        if self.config.run.output_dir is None:
            return False
        self._wait_for_save()
        already_saved = self._saved_step == self.step and self.step > 0
        return already_saved or self._save()

    def _beat(self) -> None:
        """Tell the supervisor, if there is one, which update is done."""
        if self.config.run.max_restarts and dist.is_main():
            heartbeat.beat(self.config.run.output_dir, self.step)

    def _save(self, *, in_background: bool = False) -> bool:
        """Save a checkpoint; in the background, if that is on, only copy what it needs.

        Returns:
            True if the checkpoint is complete, or copied.
        """
        self._wait_for_save()
        contents = self._contents()
        root = checkpoint_root(self.config.run.output_dir)
        background = self._background
        if background is not None and in_background:
            write = copy_checkpoint(
                root, self.step, **contents, memory=background.memory, group=background.group
            )
            background.start(write)
            self._copied_step = self.step
            return True
        saved = save_checkpoint(root, self.step, **contents)
        if saved:
            self._note_saved(self.step)
        return saved

    def _note_saved(self, step: int) -> None:
        """Note that the checkpoint of a step is complete."""
        self._saved_step = step
        root = checkpoint_root(self.config.run.output_dir)
        self.callbacks.on_save(checkpoint_folder(root, step))

    def _wait_for_save(self, timeout_s: float | None = None) -> None:
        """Wait for a checkpoint that is being written in the background."""
        if self._background is not None and self._background.wait(timeout_s):
            self._note_saved(self._copied_step)

    def _contents(self) -> dict[str, Any]:
        """Return what a checkpoint of this moment holds, as arguments of ``save_checkpoint``."""
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
            "texts": self.texts,
            "programs": self.programs,
            **self.facts,
        }
        self.metrics.sync()
        return dict(
            engines=self.engines,
            facts=facts,
            tensors=tensors,
            state=values,
            keep=self.config.run.save_total_limit,
        )

    def _restore_random(self) -> None:
        if self._restored is None:
            return
        saved = SavedState(self._restored, "random")
        self._restored = None
        if saved.same_processes:
            set_random_state(*saved.of_rank())
        else:
            # Ranks do not correspond to those that saved. The seed differs from that of the start,
            # and between ranks.
            seed_everything(self.config.run.seed + 1_000_003 * self.step + dist.rank())

    def _check_rows(self, checkpoint: Checkpoint) -> None:
        """Check that the training data and the rows of an update or rollout are as before.

        Raises:
            ValueError: they have changed.
        """
        facts = checkpoint.facts
        if facts["rows"] != len(self.loader.dataset):
            raise ValueError(
                f"--resume {self.config.run.resume}: the run had {facts['rows']} training rows, "
                f"and --data_path and --data_split now give {len(self.loader.dataset)}. Give the "
                "data of that run."
            )
        before = facts.get("data")  # missing in checkpoints of earlier versions
        now = getattr(self.loader.dataset, "items_digest", None)
        if before is not None and now is not None and before != now:
            raise ValueError(
                f"--resume {self.config.run.resume}: the run had as many training rows, but their "
                "content or order has changed since, in the files of --data_path or in the "
                "tokenizer. Give the data and the tokenizer of that run."
            )
        if facts["window_rows"] != self._window_rows:
            raise ValueError(
                f"--resume {self.config.run.resume}: each {self.unit} of that run had "
                f"{facts['window_rows']} rows (world size {facts['processes']}), and now has "
                f"{self._window_rows} (world size {dist.world_size()} x {self.loader.batch_size} "
                f"rows x {self.window} batches). Change the batch size or the number of batches "
                f"to get {facts['window_rows']} again."
            )

    def _check_texts_and_programs(self, checkpoint: Checkpoint) -> None:
        """Check that other texts than the training rows are as before; report changed programs.

        Checkpoints of earlier versions have no hashes: then nothing is checked.

        Raises:
            ValueError: texts have changed.
        """
        texts = checkpoint.facts.get("texts", {})
        for flag, digest in self.texts.items():
            if texts.get(flag, digest) != digest:
                raise ValueError(
                    f"--resume {self.config.run.resume}: the texts of {flag} have changed since. "
                    "Give those of that run, or start a new run in another --output_dir."
                )
        programs = checkpoint.facts.get("programs", {})
        for flag, digest in self.programs.items():
            if programs.get(flag, digest) != digest and dist.is_main():
                logger.warning(
                    f"{flag}: its file has changed since {self.unit} {checkpoint.step}, from which "
                    f"the run resumes. Later {self.unit}s use the new one."
                )


def _check_flags(config, checkpoint: Checkpoint) -> None:
    """Compare the flags that affect training.

    A flag that did not exist when the checkpoint was written had its default then.

    Raises:
        ValueError: some differ.
    """
    before = default_dict(config) | checkpoint.facts["config"]
    now = config_dict(config)
    changeable = set(CHANGEABLE_FLAGS)
    if checkpoint.processes != dist.world_size():
        changeable |= BATCH_SIZE_FLAGS
    changed = [
        f"--{name} was {before[name]} and is {value}"
        for name, value in now.items()
        if name not in changeable and before[name] != value
    ]
    if changed:
        raise ValueError(
            f"--resume {config.run.resume}: {checkpoint.path} is of a run with other flags: "
            f"{'; '.join(changed)}. Give the flags of that run (its run.json holds them), or start "
            "a new run in another --output_dir."
        )
