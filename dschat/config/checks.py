"""Checks of single options. Each returns the problems found: none, or one sentence that names the flag and its value."""

from dschat.config.options import DataOptions, LoraOptions, ScheduleOptions


def required(name: str, value: str) -> list[str]:
    """A problem where no model is named."""
    return [] if value else [f"{name} is required: a model folder or a hub id."]


def zero_stage(name: str, value: int) -> list[str]:
    """A problem where `value` is no ZeRO stage."""
    return [] if value in (0, 1, 2, 3) else [f"{name} {value}: ZeRO has the stages 0, 1, 2 and 3."]


def at_least(name: str, value, low) -> list[str]:
    """A problem unless `value` >= `low`."""
    return [] if value >= low else [f"{name} {value}: must be at least {low}."]


def above(name: str, value, low) -> list[str]:
    """A problem unless `value` > `low`."""
    return [] if value > low else [f"{name} {value}: must be above {low}."]


def in_range(name: str, value, low, high) -> list[str]:
    """A problem unless `low` <= `value` <= `high`."""
    return [] if low <= value <= high else [f"{name} {value}: must lie between {low} and {high}."]


def lora_problems(lora: LoraOptions, *, prefix: str = "--") -> list[str]:
    """The problems of one model's LoRA options; `prefix` is that of their flags."""
    found = at_least(f"{prefix}lora_dim", lora.lora_dim, 0)
    found += above(f"{prefix}lora_alpha", lora.lora_alpha, 0)
    return found + at_least(f"{prefix}lora_learning_rate", lora.lora_learning_rate, 0)


def data_problems(data: DataOptions) -> list[str]:
    """The problems of the data options."""
    found = [] if data.data_path else ["--data_path names no data set."]
    return found + above("--eval_fraction", data.eval_fraction, 0) + in_range(
        "--eval_fraction", data.eval_fraction, 0.0, 0.9
    )


def schedule_problems(schedule: ScheduleOptions) -> list[str]:
    """The problems of the schedule options."""
    found = at_least("--gradient_accumulation_steps", schedule.gradient_accumulation_steps, 1)
    found += at_least("--num_train_epochs", schedule.num_train_epochs, 0)
    found += at_least("--max_train_steps", schedule.max_train_steps, 0)
    return found + at_least("--num_warmup_steps", schedule.num_warmup_steps, 0)


def single_model_problems(config) -> list[str]:
    """The problems of a step that trains one model."""
    found = required("--model_name_or_path", config.model.model_name_or_path)
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
