"""The recipes of step 3, and --config, which reads them."""

from pathlib import Path

import pytest
import yaml

from dschat.config.parse import config_dict, parse_config
from dschat.config.ppo import PPOConfig

STEP3 = Path(__file__).resolve().parents[3] / "training" / "step3_rlhf_finetuning"
RECIPES = sorted((STEP3 / "training_scripts" / "recipes").glob("*.yaml"))
MODELS = "--actor_model_name_or_path a --critic_model_name_or_path c".split()


def test_all_recipes_are_there_and_in_the_guide():
    names = "dapo dr_grpo gspo grpo ppo reinforce_pp rloo vapo".split()
    assert sorted(path.stem for path in RECIPES) == sorted(names)
    guide = (STEP3 / "README.md").read_text(encoding="utf-8")
    assert [name for name in names if f"| {name}.yaml |" not in guide] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_every_value_arrives(path):
    config = config_dict(parse_config(PPOConfig, ["--config", str(path), *MODELS]))
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {name: config[name] for name in values} == values


def test_the_command_line_wins_wherever_the_file_is_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lam: 0.5\ngamma: 0.9\nwhiten_advantages: false\nreward_weights: [1, 2]\n")
    more = ["--lam", "0.7", "--whiten_advantages", "true", "--reward_weights", "3"]
    for argv in ([*more, f"--config={file}"], ["--config", str(file), *more]):
        config = parse_config(PPOConfig, [*argv, *MODELS])
        assert (config.ppo.lam, config.ppo.gamma, config.ppo.whiten_advantages) == (0.7, 0.9, True)
        assert config.model.reward_weights == [3.0]


@pytest.mark.parametrize(
    "text,words",
    [
        ("lamm: 1\n", "--lamm: no flag of that name"),
        ("lam: high\n", "--lam"),
        ("- lam\n", "expected flag names and values"),
    ],
)
def test_a_fault_of_the_file_is_named_with_it(text, words, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        parse_config(PPOConfig, ["--config", str(file), *MODELS])
    assert str(caught.value).startswith(f"{file}: ") and words in str(caught.value)


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--config"], "--config has no value"),
        (["--config", "--lam"], "--config has no value"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given 2 times"),
        (["--config", "missing.yaml"], "missing.yaml: no such configuration file"),
    ],
)
def test_a_bad_config_flag_is_explained(argv, words):
    with pytest.raises(ValueError, match=words):
        parse_config(PPOConfig, [*MODELS, *argv])
