"""Checks of the option groups that steps share.

Each returns a list of the problems found, one sentence each.
"""

import re
from pathlib import Path
from typing import Any

from dschat.config.options import DataOptions, LoraOptions, ScheduleOptions, TextOptions
from dschat.config.value_checks import (
    above,
    at_least,
    fields_at_least,
    in_range,
    required,
    seed_value,
    share,
    zero_stage,
)
from dschat.runtime.paths import user_path


def frozen_format_problems(system: Any, lora_dim: int, *, flag: str) -> list[str]:
    """Check --quantize_frozen and --enable_mixed_precision_lora against the rank of LoRA.

    Args:
        system: has both options.
        lora_dim: the value of `flag`.
        flag: the flag of the rank.
    """
    is_int8 = system.enable_mixed_precision_lora
    kind = system.quantize_frozen
    if is_int8 and kind == "nf4":
        return ["--enable_mixed_precision_lora means --quantize_frozen int8: leave it out for nf4."]
    given = "--enable_mixed_precision_lora" if is_int8 else f"--quantize_frozen {kind}"
    if (is_int8 or kind != "none") and lora_dim == 0:
        return [
            f"{given} keeps the weights that LoRA adapts in {'nf4' if kind == 'nf4' else 'int8'}: "
            f"give {flag} above 0."
        ]
    return []


def lora_problems(lora: LoraOptions, *, prefix: str = "--") -> list[str]:
    """Check one model's LoRA options; `prefix` is the prefix of their flags."""
    found = at_least(f"{prefix}lora_dim", lora.lora_dim, 0)
    found += _target_problems(lora, prefix=prefix)
    if lora.modules_to_save and not lora.only_optimize_lora:
        found.append(
            f"{prefix}modules_to_save names what trains besides the adapters: give "
            f"{prefix}lora_dim above 0 and --only_optimize_lora, without which all of them train."
        )
    found += above(f"{prefix}lora_alpha", lora.lora_alpha, 0)
    return found + at_least(f"{prefix}lora_learning_rate", lora.lora_learning_rate, 0)


def _target_problems(lora: LoraOptions, *, prefix: str) -> list[str]:
    """Check the names and regular expressions of --target_modules."""
    if not lora.target_modules:
        return []
    flag = f"{prefix}target_modules"
    found = []
    if lora.lora_dim == 0:
        found.append(f"{flag} names layers to adapt: give {prefix}lora_dim above 0.")
    if lora.lora_module_name is not None:
        found.append(f"{flag} and {prefix}lora_module_name exclude each other: give one of them.")
    if "all-linear" in lora.target_modules and len(lora.target_modules) > 1:
        found.append(f"{flag} all-linear adapts every linear layer: give no names beside it.")
    for word in lora.target_modules:
        try:
            re.compile(word)
        except (re.error, OverflowError, RecursionError) as error:
            found.append(f"{flag} {word}: neither a name nor a regular expression ({error}).")
    return found


def data_problems(data: DataOptions) -> list[str]:
    """Check the data options."""
    found = [] if data.data_path else ["--data_path names no data set."]
    found += share("--eval_fraction", data.eval_fraction, 0.9)
    found += at_least("--min_margin", data.min_margin, 0)
    found += at_least("--blend_temperature", data.blend_temperature, 1)
    for weight in data.blend:
        found += at_least("--blend", weight, 0)
    if data.blend and not any(data.blend):
        found.append("--blend: all shares are zero; give at least one above zero.")
    return found + seed_value("--data_seed", data.data_seed)


def streaming_problems(data: TextOptions, schedule: ScheduleOptions, batch: Any) -> list[str]:
    """Check that nothing needs the number of rows, which a stream does not know."""
    if not data.streaming:
        return []
    found = at_least("--shuffle_buffer", data.shuffle_buffer, 2)
    if not schedule.max_train_steps:
        found.append(
            "--streaming: the number of rows, and so of an epoch's steps, is unknown. Give the "
            "run's length with --max_train_steps."
        )
    for name in ("packing", "tokens_per_batch"):
        if getattr(batch, name, None):
            found.append(
                f"--{name} needs the lengths of all rows, which --streaming does not know. Leave "
                "one of them out."
            )
    if data.blend or data.blend_temperature != 1:
        found.append(
            "--streaming reads the data sets in turn, a row of each. Leave --blend and "
            "--blend_temperature out."
        )
    if getattr(data, "sft_only_data_path", None):
        found.append(
            "--streaming splits all its data sets by --data_split. Leave --sft_only_data_path out."
        )
    return found


def schedule_problems(schedule: ScheduleOptions) -> list[str]:
    """Check the schedule options."""
    found = at_least("--gradient_accumulation_steps", schedule.gradient_accumulation_steps, 1)
    counts = ("num_train_epochs", "max_train_steps", "num_warmup_steps")
    found += fields_at_least(schedule, counts, 0)
    ratio = schedule.warmup_ratio
    if ratio is None:
        return found
    found += in_range("--warmup_ratio", ratio, 0.0, 1.0)
    # A value equal to the default cannot be told from a flag that is left out.
    if schedule.num_warmup_steps != type(schedule)().num_warmup_steps:
        found.append("--warmup_ratio and --num_warmup_steps exclude each other: give one of them.")
    if ratio > 0 and schedule.lr_scheduler_type == "constant":
        found.append(
            "--lr_scheduler_type constant has no warm-up: give constant_with_warmup, or leave "
            "--warmup_ratio out."
        )
    return found


def output_problems(
    output_dir: str | None, models: dict[str, list[str]], *, below: tuple[str, ...] = ()
) -> list[str]:
    """Check that no model that the run reads would be overwritten by one that it saves.

    Args:
        output_dir: the output folder.
        models: the folders or hub ids that each flag names.
        below: subfolders of the output folder that models are saved to.
    """
    if not output_dir:
        return []
    output = Path(output_dir)
    written = set()
    for folder in (output, *(output / name for name in below)):
        written.add(folder.resolve())
        # The adapter of a model is replaced together with the model.
        written.add((folder / "adapter").resolve())
    found = []
    for flag, paths in models.items():
        for path in paths:
            if path and user_path(path).resolve() in written:
                found.append(
                    f"--output_dir {output_dir}: this run would replace {flag} {path}, or write "
                    "into it. Give another folder."
                )
    return found


def single_model_problems(config: Any) -> list[str]:
    """Check the options that all steps that train one model share."""
    found = required("--model_name_or_path", config.model.model_name_or_path)
    found += output_problems(config.run.output_dir, config.model.by_flag)
    found += data_problems(config.data)
    found += schedule_problems(config.schedule)
    found += streaming_problems(config.data, config.schedule, config.batch)
    found += zero_stage("--zero_stage", config.system.zero_stage)
    found += lora_problems(config.lora)
    found += at_least("--router_aux_loss_coef", config.optim.router_aux_loss_coef, 0)
    if config.lora.only_optimize_lora and config.lora.lora_dim == 0:
        found.append("--only_optimize_lora needs adapters: give --lora_dim above 0.")
    found += frozen_format_problems(config.system, config.lora.lora_dim, flag="--lora_dim")
    found += at_least("--freeze_layers", config.system.freeze_layers, 0)
    found += fields_at_least(config.optim, ("learning_rate", "weight_decay"), 0)
    found += at_least("--max_seq_len", config.data.max_seq_len, 2)
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    found += fields_at_least(config.batch, sizes, 1)
    if config.system.dropout is not None:
        found += in_range("--dropout", config.system.dropout, 0.0, 1.0)
    if config.batch.packing and config.batch.tokens_per_batch:
        found.append(
            "--packing and --tokens_per_batch exclude each other: --per_device_train_batch_size "
            "counts packed rows, whose length follows from --max_seq_len."
        )
    return found


def tokens_per_batch_problems(
    tokens: int, *, least: int, row: str, flag: str = "--tokens_per_batch"
) -> list[str]:
    """Check that the longest row fits a batch of a given number of tokens.

    Args:
        tokens: value of the flag; 0: not used.
        least: tokens of the longest row.
        row: what such a row is, for the message.
        flag: that gives `tokens`.
    """
    if tokens == 0 or tokens >= least:
        return []
    return [f"{flag} {tokens} is less than {row}: give {least} or more, or 0."]
