"""Entry points for programs and notebooks: one trainer for each step.

A trainer takes a model or a path, rows or a data set, and a configuration. It runs the same code as
the step's main, in one process or under a launcher, and returns the trained model and its metrics.
"""

import gc
import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dschat.config.flat import DPOConfig, PPOConfig, RewardConfig, SFTConfig, grouped_config
from dschat.config.ppo_options import OBJECT_PREFIX
from dschat.data.loaders import GivenTables
from dschat.data.memory import RowsInMemory, tables_in_memory
from dschat.engine.build import start_processes
from dschat.runtime import dist
from dschat.runtime.interrupt import release_signals
from dschat.runtime.lock import unlock_folder
from dschat.runtime.log import logger, set_up_logging
from dschat.steps.dpo import run_dpo
from dschat.steps.ppo import run_ppo
from dschat.steps.result import LatestMetrics, TrainResult
from dschat.steps.reward import run_reward
from dschat.steps.sft import run_sft
from dschat.steps.start_models import StartModel, delete_start_models, start_model
from dschat.tracking.callbacks import Callback

Model: TypeAlias = str | os.PathLike | PreTrainedModel
# Rows in memory, or an entry of --data_path.
Data: TypeAlias = RowsInMemory | str | os.PathLike
# Of prompts, answers and columns; or a value of --reward_fn.
RewardFunction: TypeAlias = Callable[..., Any] | str

ROWS = "train_dataset"  # the entry of --data_path that stands for rows in memory
WHOLE_SPLITS = {1: "1,0,0", 2: "0,1,0", 3: "0,0,1"}  # --data_split that gives a step all rows
TEMPORARY = "(a temporary folder)"  # the output folder of a check before training
# Variables by which a launcher tells a process its rank.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class _Trainer:
    """What the trainers share."""

    config_class: ClassVar[Any]
    step: ClassVar[int]  # whose share of --data_split it trains on
    folder: ClassVar[str] = ""  # of the trained model below the output folder
    is_classifier: ClassVar[bool] = False

    def __init__(
        self,
        model: Model | None = None,
        args: Any = None,
        train_dataset: Data | None = None,
        eval_dataset: RowsInMemory | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Iterable[Callback] = (),
    ):
        """Check everything that can be checked before a model loads.

        Args:
            model: a transformers model, or a folder or hub id; None: the one that `args` names.
            args: the configuration; None: its defaults.
            train_dataset: rows (a list of dictionaries, a datasets.Dataset or DatasetDict), or an
                entry of --data_path. All of it is for this step. None: this step's share of
                args.data_path.
            eval_dataset: rows to evaluate on, beside rows to train on; None: a share of those,
                args.eval_fraction.
            processing_class: the tokenizer of a model in memory; None: the one in the place that
                the model was loaded from. A path brings its own.
            callbacks: called during training.

        Raises:
            ValueError: an argument or an option cannot be used.
        """
        self.args = self._checked_args(args)
        self.callbacks = list(callbacks)
        self._tokenizer = processing_class
        # Options that replace those in `args`. A StartModel stands for its folder.
        self._options: dict[str, Any] = {}
        self._given = self._read_data(train_dataset, eval_dataset)
        self._options |= self._read_model(model)
        if processing_class is not None and not self._start_models():
            raise ValueError(
                "processing_class is the tokenizer of a model in memory, and all models are paths, "
                "which bring their own. Leave it out."
            )
        self._grouped(self.args.output_dir or TEMPORARY)

    def train(self) -> TrainResult:
        """Train, and return the model and the metrics. Every rank must call it.

        Raises:
            ValueError: something cannot be used; names the option.
            Stopped: a signal was received; the state has been saved if possible.
        """
        if not logger.handlers:
            set_up_logging()
        latest = LatestMetrics()
        with _processes():
            output_dir, temporary = self._output_folder()
            config = self._grouped(output_dir)
            try:
                for start in self._start_models():
                    start.save(output_dir, keep=config.run.resume is not None)
                self._run(config, [*self.callbacks, latest])
                delete_start_models(output_dir)
            finally:
                release_signals()
                unlock_folder(Path(output_dir))
                _free_memory()
        result = TrainResult(
            Path(output_dir),
            latest.values,
            folder=self.folder,
            is_classifier=self.is_classifier,
            trust_remote_code=config.model.trust_remote_code,
            temporary=temporary,
        )
        if self.args.output_dir is None and dist.has_peers():
            result.load()  # before rank 0 can delete the folder
            dist.barrier()
        return result

    def _run(self, config: Any, callbacks: list[Callback]) -> None:
        """Run the step."""
        raise NotImplementedError

    def _read_model(self, model: Model | None) -> dict[str, Any]:
        """Return the options that name the model."""
        return self._model_option("model", model, "model_name_or_path")

    def _model_option(self, name: str, model: Model | None, option: str) -> dict[str, Any]:
        """Return the option that names a model; none without a model.

        Args:
            name: of the argument, for messages.
            model: the argument.
            option: that it takes the place of.

        Raises:
            ValueError: it cannot be used, or the option is given, too.
        """
        if model is None:
            return {}
        if getattr(self.args, option):
            raise ValueError(f"{name} and args.{option} name a model each: give one of them.")
        return {option: self._named(name, model)}

    def _named(self, name: str, model: Model) -> str | StartModel:
        """Return the path of a model, or the model in memory that is yet to be saved."""
        if isinstance(model, str | os.PathLike):
            return os.fspath(model)
        return start_model(model, self._tokenizer, name=name)

    def _read_data(
        self, train_dataset: Data | None, eval_dataset: RowsInMemory | None
    ) -> GivenTables:
        """Return the tables of rows in memory, and set the options that name the data."""
        path = None
        if isinstance(train_dataset, str | os.PathLike):
            path = os.fspath(train_dataset)
        if eval_dataset is not None and (train_dataset is None or path is not None):
            raise ValueError(
                "eval_dataset needs rows as train_dataset. A folder with train.* and eval.* holds "
                "both parts."
            )
        if train_dataset is None:
            return {}
        self._options |= {"data_path": [path or ROWS], "data_split": WHOLE_SPLITS[self.step]}
        if path is not None:
            return {}
        if getattr(self.args, "streaming", False):
            raise ValueError("streaming reads files or a hub data set: leave it out for rows.")
        return {ROWS: tables_in_memory(train_dataset, eval_dataset)}

    def _checked_args(self, args: Any) -> Any:
        """Return the configuration, the default one if it is None."""
        if args is None:
            return self.config_class()
        if not isinstance(args, self.config_class):
            raise ValueError(
                f"args is of the type {type(args).__name__}: give a "
                f"dschat.{self.config_class.__name__}."
            )
        if args.dry_run:
            raise ValueError("dry_run is a flag of the command line; see python -m dschat.plan.")
        if args.max_restarts:
            raise ValueError("max_restarts is a flag of the command line: leave it out.")
        return args

    def _start_models(self) -> list[StartModel]:
        """Return the models in memory."""
        values = [one for value in self._options.values() for one in _as_list(value)]
        found = [value for value in values if isinstance(value, StartModel)]
        return list({one.name: one for one in found}.values())

    def _grouped(self, output_dir: str | os.PathLike) -> Any:
        """Return the configuration of a run in groups, checked."""
        output_dir = os.fspath(output_dir)
        changes = {name: _placed(value, output_dir) for name, value in self._options.items()}
        return grouped_config(self.args, **changes, output_dir=output_dir)

    def _output_folder(self) -> tuple[str, tempfile.TemporaryDirectory | None]:
        """Return the output folder; without args.output_dir, a temporary one, with its owner.

        Every rank must call it. The folder of rank 0 is that of all.
        """
        if self.args.output_dir is not None:
            return os.fspath(self.args.output_dir), None
        temporary = tempfile.TemporaryDirectory(prefix="dschat-") if dist.is_main() else None
        # A finished model replaces its folder, so it has to be below another one.
        own = str(Path(temporary.name) / "run") if temporary else ""
        logger.info(
            "no output_dir: the model is in a temporary folder, which is deleted with the result"
        )
        return dist.gather_texts(own)[0], temporary


class SFTTrainer(_Trainer):
    """Step 1: supervised fine-tuning of a causal language model on demonstrations."""

    config_class = SFTConfig
    step = 1

    def _run(self, config: Any, callbacks: list[Callback]) -> None:
        run_sft(config, given=self._given, callbacks=callbacks)


class RewardTrainer(_Trainer):
    """Step 2: a reward model, trained on preference pairs."""

    config_class = RewardConfig
    step = 2
    is_classifier = True

    def _run(self, config: Any, callbacks: list[Callback]) -> None:
        run_reward(config, given=self._given, callbacks=callbacks)


class DPOTrainer(_Trainer):
    """DPO: direct preference optimisation; the reference is the model that training begins with."""

    config_class = DPOConfig
    step = 2

    def _run(self, config: Any, callbacks: list[Callback]) -> None:
        run_dpo(config, given=self._given, callbacks=callbacks)


class PPOTrainer(_Trainer):
    """Step 3: PPO and its kin."""

    config_class = PPOConfig
    step = 3
    folder = "actor"

    def __init__(
        self,
        model: Model | None = None,
        args: PPOConfig | None = None,
        train_dataset: Data | None = None,
        eval_dataset: RowsInMemory | None = None,
        *,
        reward_model: Model | Sequence[Model] | None = None,
        reward_funcs: RewardFunction | Sequence[RewardFunction] = (),
        value_model: Model | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Iterable[Callback] = (),
    ):
        """Check everything that can be checked before a model loads.

        The score of an answer is the weighted sum of all rewards; see args.reward_weights.

        Args:
            model: the SFT model, from which the actor starts; as in the other trainers.
            args: the configuration; None: its defaults.
            train_dataset: prompts; as in the other trainers.
            eval_dataset: held-out prompts; as in the other trainers.
            reward_model: one or several reward models.
            reward_funcs: functions ``(prompts, answers, **columns) -> scores``, names of graders,
                or "file.py:function"; see --reward_fn.
            value_model: the critic starts from it; None: from the first reward model. Estimators
                other than gae have no critic.
            processing_class: the tokenizer of models in memory.
            callbacks: called during training.

        Raises:
            ValueError: an argument or an option cannot be used.
        """
        self._rewards = [] if reward_model is None else _as_list(reward_model)
        self._value_model = value_model
        self._functions: dict[str, Callable] = {}
        self._function_names = [self._function_name(one) for one in _as_list(reward_funcs)]
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )

    def _run(self, config: Any, callbacks: list[Callback]) -> None:
        run_ppo(config, given=self._given, functions=self._functions, callbacks=callbacks)

    def _read_model(self, model: Model | None) -> dict[str, Any]:
        """Return the options that name the models and the rewards."""
        found = self._model_option("model", model, "actor_model_name_or_path")
        rewards = [
            self._named("reward_model" if number == 0 else f"reward_model_{number}", reward)
            for number, reward in enumerate(self._rewards)
        ]
        if rewards:
            found["reward_model_name_or_path"] = rewards
        if self._value_model is not None:
            critic = "critic_model_name_or_path"
            found |= self._model_option("value_model", self._value_model, critic)
        elif rewards and not self.args.critic_model_name_or_path:
            found["critic_model_name_or_path"] = rewards[0]
        if self._functions and self.args.reward_workers:
            raise ValueError(
                "reward_workers are processes that load functions of files: give reward_funcs as "
                "file.py:function, or leave reward_workers out."
            )
        if self._function_names:
            found["reward_fn"] = [*_as_list(self.args.reward_fn), *self._function_names]
        return found

    def _function_name(self, function: RewardFunction) -> str:
        """Return the value of --reward_fn that stands for a function, and keep the function."""
        if isinstance(function, str):
            return function
        if not callable(function):
            raise ValueError(
                f"reward_funcs has a {type(function).__name__}: give functions of prompts and "
                "answers, or names of graders."
            )
        found: Any = function() if inspect.isclass(function) else function
        inner = getattr(found, "func", found)  # of a functools.partial
        name = getattr(inner, "__name__", type(inner).__name__)
        name = OBJECT_PREFIX + (name if name.isidentifier() else "function")
        taken = [one for one in self._functions if one.rstrip("_0123456789") == name]
        if taken:
            name = f"{name}_{len(taken) + 1}"
        self._functions[name] = found
        return name


@contextmanager
def _processes() -> Iterator[None]:
    """Join the process group; afterwards set the environment back, for programs started later."""
    before = {name for name in RANK_VARIABLES if name in os.environ}
    start_processes()
    try:
        yield
    finally:
        for name in set(RANK_VARIABLES) - before:
            os.environ.pop(name, None)


def _free_memory() -> None:
    """Free the engines of a run, whose parts refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _as_list(value: Any) -> list:
    """Return a list or tuple as a list, and anything else as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _placed(value: Any, output_dir: str) -> Any:
    """Return the value of an option with the folders of models in memory."""
    if isinstance(value, list):
        return [_placed(one, output_dir) for one in value]
    return value.path(output_dir) if isinstance(value, StartModel) else value
