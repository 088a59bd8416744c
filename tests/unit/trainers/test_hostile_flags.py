"""Flags with values that nobody means: each run is planned, or one ValueError names the flag."""

import dataclasses
import typing

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dschat.config.chat import ChatConfig
from dschat.config.dpo import DPOConfig
from dschat.config.eval_tools import PromptEvalConfig, RewardEvalConfig
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig
from dschat.trainers.preflight import dry_run

QUICK = settings(max_examples=250, deadline=None, derandomize=True, database=None)
MODEL = "--model_name_or_path opt-125m"
NEEDED = {
    SFTConfig: MODEL,
    RewardConfig: MODEL,
    DPOConfig: MODEL,
    PPOConfig: "--actor_model_name_or_path opt-125m --critic_model_name_or_path opt-125m",
    ChatConfig: "--path m",
    PromptEvalConfig: "--model_name_or_path_baseline m --model_name_or_path_finetune n",
    RewardEvalConfig: "--model_name_or_path m",
}
STEPS = (SFTConfig, RewardConfig, DPOConfig, PPOConfig)
FLAGS = [
    (config, field.name)
    for config in NEEDED
    for group in typing.get_type_hints(config).values()
    for field in dataclasses.fields(group)
]
NUMBERS = ["2147483648", "9223372036854775808", "-9223372036854775809", "1" + 400 * "0"]
NUMBERS += ["0", "-1", "1e400", "nan", "-inf", "1.5", "5_0", "\u0663"]
TEXTS = ["--", "", "-", " ", "x", "\0", "a\0b", "\ud800", "x" * 256, "a/" * 3000, "None", "[]"]
UNUSABLE = ["--", "a\0b", "\ud800", "x" * 256, "x/" * 3000]
VALUES = st.sampled_from(NUMBERS + TEXTS) | st.integers().map(str) | st.text(max_size=5)


def outcome(config_class, argv: list[str]) -> str:
    """Return the message that refuses `argv`, or ""."""
    try:
        config = parse_config(config_class, argv)
        if config_class in STEPS:
            dry_run(config)
    except ValueError as error:
        return str(error)
    return ""


@QUICK
@given(flag=st.sampled_from(FLAGS), value=VALUES, joined=st.booleans())
@example(flag=(SFTConfig, "min_margin"), value="--", joined=True)
@example(flag=(SFTConfig, "lora_module_name"), value="--", joined=True)
@example(flag=(PPOConfig, "data_path"), value="--", joined=False)
@example(flag=(PPOConfig, "actor_learning_rate"), value="-inf", joined=False)
@example(flag=(SFTConfig, "max_seq_len"), value=NUMBERS[3], joined=False)
@example(flag=(PPOConfig, "per_device_eval_batch_size"), value=NUMBERS[3], joined=False)
@example(flag=(SFTConfig, "lora_dim"), value=NUMBERS[0], joined=False)
@example(flag=(PPOConfig, "critic_lora_dim"), value=NUMBERS[1], joined=False)
@example(flag=(SFTConfig, "output_dir"), value="a\0b", joined=False)
@example(flag=(SFTConfig, "output_dir"), value="\ud800", joined=False)
@example(flag=(SFTConfig, "model_name_or_path"), value="1" + 400 * "0", joined=False)
@example(flag=(DPOConfig, "deepscale_config"), value="x", joined=False)
def test_a_value_is_used_or_refused_with_the_name_of_its_flag(flag, value, joined):
    config_class, name = flag
    words = [f"--{name}={value}"] if joined else [f"--{name}", value]
    argv = [*NEEDED[config_class].split(), *words]
    if config_class in STEPS:
        argv.append("--dry_run")
    message = outcome(config_class, argv)
    # A value that looks like a flag is taken for one, and named.
    named = f"--{name}" in message or (value.startswith("-") and value.split("=")[0] in message)
    assert not message or named
    message.encode()  # it can be printed


@pytest.mark.parametrize("config_class", NEEDED)
def test_no_flag_takes_a_value_that_is_neither_a_name_nor_a_path(config_class):
    names = [name for config, name in FLAGS if config is config_class]
    for i, name in enumerate(names):
        argv = [*NEEDED[config_class].split(), f"--{name}={UNUSABLE[i % len(UNUSABLE)]}"]
        lines = outcome(config_class, argv).splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"--{name} "), lines


def test_a_configuration_file_of_such_values_is_named_with_the_flag(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"model_name_or_path": "m", "output_dir": "a\\u0000b"}')
    assert outcome(SFTConfig, [str(path)]) == (
        f"{path}: --output_dir 'a\\x00b': holds a NUL character. Type it again."
    )
    path.write_text('{"a": ' + 100_000 * "[" + "}")
    assert "not readable as JSON" in outcome(SFTConfig, [str(path)])


def test_a_rank_above_every_adapted_matrix_is_refused():
    argv = [*MODEL.split(), "--dry_run", "--lora_dim"]
    # The feed-forward part of opt-125m has 3072 columns.
    assert outcome(SFTConfig, [*argv, "3072"]) == ""
    assert outcome(SFTConfig, [*argv, "3073"]) == (
        "--lora_dim 3073: the largest adapted matrix has 3072 rows or columns, and a higher rank "
        "adds nothing. Give a smaller one."
    )
