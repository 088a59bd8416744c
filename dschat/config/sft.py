"""The configuration of step 1, supervised fine-tuning."""

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
    TrainOn,
    flag,
)
from dschat.config.value_checks import at_least


@dataclass(frozen=True)
class SFTData(TextOptions):
    """The data of step 1."""

    sft_only_data_path: list[str] = flag([], "Data sets for this step only, used in full.")
    train_on: TrainOn = flag(
        "all_assistant",
        "What is learned of a conversation: all_assistant (every turn of the assistant), last (the "
        "last one), or all (the prompt too).",
    )


@dataclass(frozen=True)
class SFTRun(RunOptions):
    """Output of step 1."""

    tensorboard_path: str = flag("step1_tensorboard", "Folder of the TensorBoard events.")
    eval_iters: int = flag(100, "Evaluate on at most this many batches per rank.")
    print_loss: bool = flag(False, "Print the loss of every optimizer step.")


@dataclass(frozen=True)
class SFTConfig:
    """Step 1, supervised fine-tuning."""

    data: SFTData
    model: OneModelOptions
    batch: BatchOptions
    optim: OptimOptions
    schedule: ScheduleOptions
    lora: LoraOptions
    system: SystemOptions
    run: SFTRun

    def problems(self) -> list[str]:
        """Return everything that is wrong with these options, one sentence each."""
        found = single_model_problems(self)
        found += at_least("--eval_iters", self.run.eval_iters, 1)
        return found + tokens_per_batch_problems(
            self.batch.tokens_per_batch,
            least=self.data.max_seq_len,
            row="one text of --max_seq_len",
        )
