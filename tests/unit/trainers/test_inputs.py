"""Wrong models and wrong data of a run are told together, before anything loads."""

import shutil
from functools import partial

import pytest

from dschat.config.dpo import DPOConfig
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig
from dschat.data.loaders import open_prompt_rows
from dschat.models.tokenizer import load_tokenizer
from dschat.steps.dpo import run_dpo
from dschat.steps.ppo import load_plan
from dschat.steps.reward import run_reward
from dschat.steps.sft import run_sft
from dschat.trainers import supervised_run
from dschat.trainers.inputs import model_checks, with_other_faults
from dschat.trainers.reward_plan import plan_rewards
from tests.unit.models_helpers import tiny

FLAGS = "--actor_model_name_or_path {actor} --critic_model_name_or_path {critic} --data_path d"


def config_of(*words: str, **models: str) -> PPOConfig:
    return parse_config(PPOConfig, [*FLAGS.format(**models).split(), *words])


def fail(message: str) -> None:
    raise ValueError(message)


def test_each_fault_is_told_once():
    checks = [lambda: fail("one"), lambda: None, lambda: fail("two")]
    assert str(with_other_faults(ValueError("one"), checks)) == "one\ntwo"


def test_every_wrong_model_is_named_by_its_flag(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    config = config_of(actor=str(tmp_path / "none"), critic=str(empty))
    told = str(with_other_faults(ValueError("the data is wrong"), model_checks(config.model)))
    lines = told.splitlines()
    assert len(lines) == 4 and lines[0] == "the data is wrong"
    assert "--actor_model_name_or_path" in lines[1] and "does not exist" in lines[1]
    assert "--critic_model_name_or_path" in lines[2] and "holds no tokenizer" in lines[2]
    assert "--critic_model_name_or_path" in lines[3] and "missing: config.json, weights" in lines[3]


def test_a_reward_model_without_a_head_is_refused_before_it_loads():
    path = tiny("llama")
    tokenizer = load_tokenizer(path)
    with pytest.raises(ValueError, match="--critic_model_name_or_path .* without a reward head"):
        plan_rewards(config_of(actor=path, critic=path), tokenizer)
    with pytest.raises(ValueError, match="--reward_model_name_or_path .* without a reward head"):
        words = ["--reward_model_name_or_path", path]
        plan_rewards(config_of(*words, actor=path, critic=path), tokenizer)
    # A critic whose scores are not the reward may start from a language model.
    rewarded = config_of("--reward_fn", "exact_match", actor=path, critic=path)
    assert plan_rewards(rewarded, tokenizer).model_tokenizers == {}


def test_a_wrong_model_and_wrong_data_are_told_together(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"\n')
    words = ["--data_path", str(rows), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(supervised_run, "start_processes", lambda rank: None)
    complete, weightless = tiny("llama"), tmp_path / "weightless"
    shutil.copytree(complete, weightless)
    (weightless / "model.safetensors").unlink()
    steps = ((run_sft, SFTConfig), (run_reward, RewardConfig), (run_dpo, DPOConfig))
    for run, config_class in steps:
        for model in (weightless, tmp_path / "none"):
            config = parse_config(config_class, ["--model_name_or_path", str(model), *words])
            with pytest.raises(ValueError) as error:
                run(config)
            assert f"--model_name_or_path '{model}'" in str(error.value)
            assert "rows.jsonl, line 1: not readable as JSON" in str(error.value)
    config = config_of(*words, actor=str(weightless), critic=complete)
    with pytest.raises(ValueError) as error:
        load_plan(config, functions=None, open_rows=partial(open_prompt_rows, config.data))
    assert "--actor_model_name_or_path" in str(error.value) and "line 1" in str(error.value)
