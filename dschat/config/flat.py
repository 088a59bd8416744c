"""Configurations of the steps as one flat object each, for programs that call the trainers.

Every flag is a keyword: ``SFTConfig(output_dir="output/sft", learning_rate=1e-5)``. The steps
themselves read the same options in groups; see ``grouped_config``.
"""

import dataclasses
import os
import typing
from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import TypeAdapter, ValidationError

from dschat.config import dpo, options, ppo, ppo_objective, ppo_options, reward, sft
from dschat.config.parse import check_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(
    sft.SFTData,
    options.OneModelOptions,
    options.BatchOptions,
    options.OptimOptions,
    options.ScheduleOptions,
    options.LoraOptions,
    options.SystemOptions,
    sft.SFTRun,
):
    """All options of step 1, supervised fine-tuning."""

    grouped_class: ClassVar[type] = sft.SFTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(
    reward.RewardData,
    options.OneModelOptions,
    options.BatchOptions,
    reward.RewardOptim,
    options.ScheduleOptions,
    options.LoraOptions,
    options.SystemOptions,
    reward.RewardLoss,
    reward.RewardRun,
):
    """All options of step 2, the reward model."""

    grouped_class: ClassVar[type] = reward.RewardConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(
    options.TextOptions,
    options.OneModelOptions,
    options.BatchOptions,
    dpo.DPOOptim,
    options.ScheduleOptions,
    options.LoraOptions,
    dpo.DPOSystem,
    dpo.DPOAlgorithm,
    dpo.DPORun,
):
    """All options of DPO."""

    grouped_class: ClassVar[type] = dpo.DPOConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(  # type: ignore[misc]  # two groups have further methods of one name, not used here
    ppo_options.PPOData,
    ppo_options.PPOModels,
    ppo_options.PPOBatch,
    ppo_options.PPOOptim,
    ppo_options.PPOSchedule,
    ppo_options.PPOLora,
    ppo_options.PPOSystem,
    ppo_options.PPOSampling,
    ppo_options.PPOAlgorithm,
    ppo_objective.PPOObjective,
    ppo_options.PPORun,
):
    """All options of step 3, PPO and its kin."""

    grouped_class: ClassVar[type] = ppo.PPOConfig


def grouped_config(config: Any, **changes: Any) -> Any:
    """Return a flat configuration as the groups that a step reads, checked.

    A single text stands for a list of one, and a Path for its text.

    Args:
        config: one of the classes of this file.
        changes: options that replace those in `config`.

    Returns:
        An instance of ``config.grouped_class``.

    Raises:
        ValueError: an option is of a wrong type, or has a bad value. The message lists them all.
    """
    flat = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    flat |= changes
    grouped_class = config.grouped_class
    groups: dict[str, Any] = {}
    faults: list[str] = []
    for name, group_class in typing.get_type_hints(grouped_class).items():
        hints = typing.get_type_hints(group_class)
        fields = [field.name for field in dataclasses.fields(group_class)]
        values = {field: _plain(flat[field], hints[field]) for field in fields}
        faults += _type_faults(values, hints)
        groups[name] = group_class(**values)
    if faults:
        raise ValueError("\n".join(faults))
    found = grouped_class(**groups)
    check_config(found)
    return found


def _plain(value: Any, hint: Any) -> Any:
    """Return an option as its flag would give it."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if typing.get_origin(hint) is not list:
        return value
    if isinstance(value, str) or not isinstance(value, Iterable):
        return [value]
    return [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]


def _type_faults(values: dict[str, Any], hints: dict[str, Any]) -> list[str]:
    """Return a sentence for each value that is not of its type."""
    faults = []
    for name, value in values.items():
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Input ")
            faults.append(f"--{name} {value!r} {reason}.")
    return faults
