"""The flat configurations have every flag of their step, checked like flags."""

import dataclasses
from pathlib import Path

import pytest

from dschat.config import flat
from dschat.config.parse import config_dict, parse_config

CLASSES = (flat.SFTConfig, flat.RewardConfig, flat.DPOConfig, flat.PPOConfig)
REQUIRED = {"critic_model_name_or_path", "actor_model_name_or_path", "model_name_or_path"}


def minimal(config_class) -> dict:
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: f"models/{name}" for name in REQUIRED & names}


@pytest.mark.parametrize("config_class", CLASSES)
def test_options_and_defaults_are_those_of_the_flags(config_class):
    given = minimal(config_class)
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    parsed = parse_config(config_class.grouped_class, words)
    found = flat.grouped_config(config_class(**given))
    assert found == parsed
    names = {field.name for field in dataclasses.fields(config_class)}
    assert names == set(config_dict(parsed))


def test_a_text_stands_for_a_list_and_a_path_for_its_text():
    config = flat.SFTConfig(model_name_or_path=Path("m"), data_path="a", report_to=("csv", "none"))
    found = flat.grouped_config(config, output_dir=Path("o"))
    assert found.model.model_name_or_path == "m" and found.run.output_dir == "o"
    assert (found.data.data_path, found.run.report_to) == (["a"], ["csv", "none"])


def test_every_wrong_type_is_named():
    config = flat.SFTConfig(
        learning_rate="1e-4", lora_dim=True, prompt_format="fancy", data_path=[1], max_seq_len=1.5
    )
    with pytest.raises(ValueError, match="learning_rate") as raised:
        flat.grouped_config(config)
    lines = str(raised.value).splitlines()
    names = {"--learning_rate", "--lora_dim", "--prompt_format", "--data_path", "--max_seq_len"}
    assert {line.split()[0] for line in lines} == names


def test_values_are_checked_like_flags():
    with pytest.raises(ValueError, match="--learning_rate -1: must be at least 0"):
        flat.grouped_config(flat.SFTConfig(model_name_or_path="m", learning_rate=-1))
