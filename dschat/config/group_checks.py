"""Checks of the option groups that steps share. Each returns the problems found, one sentence each."""

from pathlib import Path

from dschat.config.options import DataOptions, LoraOptions, ScheduleOptions
from dschat.config.value_checks import (
    above,
    at_least,
    in_range,
    required,
    seed_value,
    share,
    zero_stage,
)
from dschat.runtime.paths import user_path


def lora_problems(lora: LoraOptions, *, prefix: str = "--") -> list[str]:
    """The problems of one model's LoRA options; `prefix` is that of their flags."""
    found = at_least(f"{prefix}lora_dim", lora.lora_dim, 0)
    found += above(f"{prefix}lora_alpha", lora.lora_alpha, 0)
    return found + at_least(f"{prefix}lora_learning_rate", lora.lora_learning_rate, 0)


def data_problems(data: DataOptions) -> list[str]:
    """The problems of the data options."""
    found = [] if data.data_path else ["--data_path names no data set."]
    found += share("--eval_fraction", data.eval_fraction, 0.9)
    return found + seed_value("--data_seed", data.data_seed)


def schedule_problems(schedule: ScheduleOptions) -> list[str]:
    """The problems of the schedule options."""
    found = at_least("--gradient_accumulation_steps", schedule.gradient_accumulation_steps, 1)
    found += at_least("--num_train_epochs", schedule.num_train_epochs, 0)
    found += at_least("--max_train_steps", schedule.max_train_steps, 0)
    return found + at_least("--num_warmup_steps", schedule.num_warmup_steps, 0)


def output_problems(
    output_dir: str | None, models: dict[str, list[str]], *, below: tuple[str, ...] = ()
) -> list[str]:
    """A problem for each model that the run reads where it would write another.

    Args:
        models: flags, and the folders or hub ids that they name.
        below: folders in the output folder that models are saved to.
    """
    if not output_dir:
        return []
    output = Path(output_dir)
    # A model folder may hold its adapter, which is replaced with it.
    written = [
        folder / more
        for folder in (output, *(output / name for name in below))
        for more in ("", "adapter")
    ]
    written = {folder.resolve() for folder in written}
    return [
        f"--output_dir {output_dir}: this run would replace {flag} {path}, or write into it. Give another folder."
        for flag, paths in models.items()
        for path in paths
        if path and user_path(path).resolve() in written
    ]


def single_model_problems(config) -> list[str]:
    """The problems of a step that trains one model."""
    found = required("--model_name_or_path", config.model.model_name_or_path)
    found += output_problems(config.run.output_dir, config.model.by_flag)
    found += data_problems(config.data) + schedule_problems(config.schedule)
    found += zero_stage("--zero_stage", config.system.zero_stage)
    found += lora_problems(config.lora)
    if config.lora.only_optimize_lora and config.lora.lora_dim == 0:
        found.append("--only_optimize_lora needs adapters: give --lora_dim above 0.")
    if config.system.enable_mixed_precision_lora and config.lora.lora_dim == 0:
        found.append(
            "--enable_mixed_precision_lora keeps the weights that LoRA adapts in int8: give --lora_dim above 0."
        )
    found += at_least("--freeze_layers", config.system.freeze_layers, 0)
    for name in ("learning_rate", "weight_decay"):
        found += at_least("--" + name, getattr(config.optim, name), 0)
    found += at_least("--max_seq_len", config.data.max_seq_len, 2)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        found += at_least("--" + name, getattr(config.batch, name), 1)
    if config.system.dropout is not None:
        found += in_range("--dropout", config.system.dropout, 0.0, 1.0)
    return found
