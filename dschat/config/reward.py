"""The configuration of step 2, the reward model."""

from dataclasses import dataclass

from dschat.config.group_checks import single_model_problems, tokens_per_batch_problems
from dschat.config.options import (
    BatchOptions,
    LoraOptions,
    OneModelOptions,
    OptimOptions,
    RunOptions,
    ScheduleOptions,
    SystemOptions,
    TextOptions,
    flag,
)
from dschat.config.value_checks import at_least, in_range


@dataclass(frozen=True)
class RewardData(TextOptions):
    """The pairs of chosen and rejected answers."""

    cut_fraction: float = flag(
        0.0,
        "Share of the training pairs whose two answers are cut to the same random length, without "
        "end token, so that the model learns to score unfinished answers too.",
    )


@dataclass(frozen=True)
class RewardOptim(OptimOptions):
    """The optimizer of step 2."""

    learning_rate: float = flag(5e-5, "Peak learning rate of the base weights.")


@dataclass(frozen=True)
class RewardLoss:
    """The loss of step 2."""

    _argument_group_name = "reward model"

    center_rewards_coef: float = flag(
        0.0,
        "Weight in the loss of the squared sum of a pair's two scores, which keeps scores around "
        "0; 0: their level is free. 0.01 is usual.",
    )


@dataclass(frozen=True)
class RewardRun(RunOptions):
    """Output and evaluation of step 2."""

    tensorboard_path: str = flag("step2_tensorboard", "Folder of the TensorBoard events.")
    eval_interval: int = flag(
        0, "Evaluate every so many optimizer steps; 0: before training and after each epoch."
    )
    eval_iters: int = flag(100, "Evaluate on at most this many batches per rank.")
    num_padding_at_beginning: int = flag(
        1, "Accepted for compatibility, no effect: positions come from the attention mask."
    )


@dataclass(frozen=True)
class RewardConfig:
    """Step 2, reward model."""

    data: RewardData
    model: OneModelOptions
    batch: BatchOptions
    optim: RewardOptim
    schedule: ScheduleOptions
    lora: LoraOptions
    system: SystemOptions
    loss: RewardLoss
    run: RewardRun

    def problems(self) -> list[str]:
        """Return everything that is wrong with these options, one sentence each."""
        found = single_model_problems(self)
        found += tokens_per_batch_problems(
            self.batch.tokens_per_batch,
            least=2 * self.data.max_seq_len,
            row="one pair of texts of --max_seq_len",
        )
        found += in_range("--cut_fraction", self.data.cut_fraction, 0.0, 1.0)
        found += at_least("--center_rewards_coef", self.loss.center_rewards_coef, 0)
        found += at_least("--eval_interval", self.run.eval_interval, 0)
        found += at_least("--eval_iters", self.run.eval_iters, 1)
        return found
