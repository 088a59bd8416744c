"""The configuration of DPO.

DPO replaces steps 2 and 3. It shares the options of the other steps that train one model.
"""

from dataclasses import dataclass
from typing import Literal, Optional

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
from dschat.config.value_checks import above, at_least, in_range


@dataclass(frozen=True)
class DPOOptim(OptimOptions):
    """The optimizer of DPO."""

    learning_rate: float = flag(1e-6, "Peak learning rate of the base weights.")


@dataclass(frozen=True)
class DPOSystem(SystemOptions):
    """Memory options of the trained model and the reference."""

    dropout: Optional[float] = flag(
        0.0,
        "Dropout probability of every layer of the trained model. Above 0, its ratio to the "
        "reference is noisy.",
    )
    offload_reference_model: bool = flag(
        False,
        "Keep the reference model's weights in host memory. It then runs under ZeRO-3, whatever "
        "--zero_stage is.",
    )
    share_reference: bool = flag(
        True,
        "With --only_optimize_lora: use the trained model without its adapters as the reference, "
        "instead of a copy.",
    )


@dataclass(frozen=True)
class DPOAlgorithm:
    """The loss of DPO."""

    _argument_group_name = "DPO"

    beta: float = flag(
        0.1, "Weight of the KL divergence from the reference: rewards are beta times log ratios."
    )
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = flag(
        "sigmoid",
        "Loss of a pair: sigmoid (DPO), ipo (squared distance of the log ratios, per token, to "
        "1 / (2 * beta)), hinge (SLiC), or robust (unbiased if --label_smoothing of the pairs are "
        "swapped).",
    )
    label_smoothing: float = flag(
        0.0,
        "Assumed share of pairs with swapped labels (sigmoid: conservative DPO; robust: needed).",
    )

    def problems(self) -> list[str]:
        """Return what is wrong with these options, one sentence each."""
        found = above("--beta", self.beta, 0)
        found += in_range("--label_smoothing", self.label_smoothing, 0.0, 0.5)
        if self.loss_type in ("ipo", "hinge") and self.label_smoothing:
            found.append(
                f"--loss_type {self.loss_type} has no --label_smoothing: leave it out, or give "
                "--loss_type sigmoid or robust."
            )
        if self.loss_type == "robust" and self.label_smoothing in (0.0, 0.5):
            found.append(
                "--loss_type robust needs the share of swapped pairs: give --label_smoothing "
                "above 0 and below 0.5."
            )
        return found


@dataclass(frozen=True)
class DPORun(RunOptions):
    """Output and evaluation of DPO."""

    tensorboard_path: str = flag("step2_tensorboard", "Folder of the TensorBoard events.")
    eval_interval: int = flag(
        0, "Evaluate every so many optimizer steps; 0: before training and after each epoch."
    )
    eval_iters: int = flag(100, "Evaluate on at most this many batches per rank.")
    print_loss: bool = flag(False, "Print the loss of every optimizer step.")


@dataclass(frozen=True)
class DPOConfig:
    """DPO, direct preference optimisation."""

    data: TextOptions
    model: OneModelOptions
    batch: BatchOptions
    optim: DPOOptim
    schedule: ScheduleOptions
    lora: LoraOptions
    system: DPOSystem
    dpo: DPOAlgorithm
    run: DPORun

    @property
    def shares_reference(self) -> bool:
        """Whether the reference is the trained model with its adapters off."""
        return self.system.share_reference and self.lora.keeps_start

    def problems(self) -> list[str]:
        """Return everything that is wrong with these options, one sentence each."""
        found = single_model_problems(self)
        found += tokens_per_batch_problems(
            self.batch.tokens_per_batch,
            least=2 * self.data.max_seq_len,
            row="one pair of texts of --max_seq_len",
        )
        found += at_least("--eval_interval", self.run.eval_interval, 0)
        return found + at_least("--eval_iters", self.run.eval_iters, 1)
