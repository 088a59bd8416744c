"""Arguments of the trainers, which are checked before any model loads."""

import functools
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dschat
from dschat.steps import trainers
from dschat.steps.start_models import StartModel
from tests.unit.models_helpers import tiny

ROWS = [{"prompt": f"p{i}", "chosen": f" good{i}", "rejected": f" bad{i}"} for i in range(8)]


@pytest.fixture(scope="module")
def base() -> str:
    return tiny("llama")


@pytest.fixture(scope="module")
def model(base):
    return AutoModelForCausalLM.from_pretrained(base)


def test_the_package_has_every_name_that_it_lists():
    assert all(getattr(dschat, name).__name__ == name for name in dschat.__all__)


def config_of(trainer, output_dir="out"):
    """Return the configuration that a run of `trainer` would have."""
    return trainer._grouped(output_dir)


@pytest.mark.parametrize(
    ("trainer_class", "split"),
    [
        (dschat.SFTTrainer, "1,0,0"),
        (dschat.RewardTrainer, "0,1,0"),
        (dschat.DPOTrainer, "0,1,0"),
    ],
)
def test_rows_are_for_the_step_alone(trainer_class, split, base):
    config = config_of(trainer_class(base, train_dataset=ROWS))
    assert (config.data.data_path, config.data.data_split) == (["train_dataset"], split)
    assert config.model.model_name_or_path == base
    assert isinstance(config, trainer_class.config_class.grouped_class)


def test_a_path_of_data_is_used_in_full_and_options_keep_their_split(base, tmp_path):
    config = config_of(dschat.SFTTrainer(base, train_dataset=tmp_path / "rows.jsonl"))
    assert config.data.data_path == [str(tmp_path / "rows.jsonl")]
    assert config.data.data_split == "1,0,0"
    args = dschat.SFTConfig(model_name_or_path=base, data_path=["rows.jsonl"])
    assert config_of(dschat.SFTTrainer(args=args)).data.data_split == "2,4,4"


def test_the_output_folder_of_the_arguments_is_that_of_the_run(base, tmp_path):
    args = dschat.SFTConfig(output_dir=tmp_path / "out")
    trainer = dschat.SFTTrainer(base, args, ROWS)
    assert trainer._output_folder() == (str(tmp_path / "out"), None)


def test_without_an_output_folder_there_is_a_temporary_one(base):
    folder, temporary = dschat.SFTTrainer(base, train_dataset=ROWS)._output_folder()
    assert os.path.dirname(folder) == temporary.name and os.path.isdir(temporary.name)
    temporary.cleanup()


def test_models_in_memory_are_saved_once_below_the_output_folder(base, model, tmp_path):
    trainer = dschat.PPOTrainer(
        model, dschat.PPOConfig(), ROWS, reward_model=[model, base], reward_funcs="numeric_match"
    )
    options = config_of(trainer, str(tmp_path)).model
    folder = tmp_path / "start_models"
    assert options.actor_model_name_or_path == str(folder / "model")
    assert options.reward_model_name_or_path == [str(folder / "reward_model"), base]
    assert options.critic_model_name_or_path == str(folder / "reward_model")
    assert [start.name for start in trainer._start_models()] == ["model", "reward_model"]


def test_a_model_in_memory_is_saved_with_its_tokenizer_and_kept_on_resume(base, model, tmp_path):
    start = trainers.start_model(model, None, name="model")
    folder = tmp_path / "start_models" / "model"
    start.save(str(tmp_path), keep=True)
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    vocabulary = AutoTokenizer.from_pretrained(base).get_vocab()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == vocabulary

    other = AutoModelForCausalLM.from_config(model.config)
    changed = StartModel("model", other, start.tokenizer)
    name = next(iter(again))
    for keep, expected in ((True, model), (False, other)):
        changed.save(str(tmp_path), keep=keep)
        found = AutoModelForCausalLM.from_pretrained(folder).state_dict()[name]
        assert torch.equal(found, expected.state_dict()[name])


def length(prompts, answers, **columns):
    return [len(answer) for answer in answers]


class Scorer:
    def __call__(self, prompts, answers, **columns):
        return [0.0] * len(answers)


def test_reward_functions_get_names_that_the_configuration_holds(base):
    funcs = [length, Scorer, lambda p, a, **c: [], functools.partial(length), "valid_json"]
    args = dschat.PPOConfig(reward_fn="length_penalty(limit=9)", reward_weights=[1, 2, 3, 4, 5, 6])
    trainer = dschat.PPOTrainer(base, args, ROWS, value_model=base, reward_funcs=funcs)
    names = ["object:length", "object:Scorer", "object:function", "object:length_2"]
    assert config_of(trainer).model.reward_fn == ["length_penalty(limit=9)", *names, "valid_json"]
    assert list(trainer._functions) == names
    found = [trainer._functions[name] for name in names]
    assert isinstance(found.pop(1), Scorer) and found == [funcs[0], *funcs[2:4]]
    assert config_of(trainer).reward_models == []


def test_one_reward_model_is_critic_and_reward(base):
    trainer = dschat.PPOTrainer(base, train_dataset=ROWS, reward_model=base, value_model="other")
    assert config_of(trainer).model.critic_model_name_or_path == "other"
    assert config_of(trainer).reward_models == [base]


REFUSED = {
    "no model": (dict(train_dataset=ROWS), "--model_name_or_path is required"),
    "two models": (
        dict(model="a", args=dschat.SFTConfig(model_name_or_path="b")),
        "model and args.model_name_or_path",
    ),
    "another configuration": (dict(model="a", args=dschat.DPOConfig()), "dschat.SFTConfig"),
    "a dry run": (dict(model="a", args=dschat.SFTConfig(dry_run=True)), "python -m dschat.plan"),
    "restarts": (
        dict(model="a", args=dschat.SFTConfig(max_restarts=1, output_dir="o", save_interval=1)),
        "max_restarts is a flag",
    ),
    "another model": (dict(model=torch.nn.Linear(1, 1)), "model is of the type Linear"),
    "evaluation rows alone": (dict(model="a", eval_dataset=ROWS), "needs rows as train_dataset"),
    "evaluation rows beside a path": (
        dict(model="a", train_dataset="rows.jsonl", eval_dataset=ROWS),
        "needs rows as train_dataset",
    ),
    "a stream of rows": (
        dict(model="a", args=dschat.SFTConfig(streaming=True), train_dataset=ROWS),
        "streaming reads files",
    ),
    "rows of another type": (dict(model="a", train_dataset={"a": 1}), "train_dataset is of the"),
    "a tokenizer beside a path": (
        dict(model="a", train_dataset=ROWS, processing_class=object()),
        "bring their own",
    ),
    "a bad option": (
        dict(model="a", args=dschat.SFTConfig(learning_rate=-1)),
        "--learning_rate -1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_are_refused_at_the_start(case):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        dschat.SFTTrainer(**arguments)


def test_a_reward_that_is_no_function_is_refused(base):
    with pytest.raises(ValueError, match="reward_funcs has a int"):
        dschat.PPOTrainer(base, train_dataset=ROWS, value_model=base, reward_funcs=[3])


def test_processes_of_rewards_cannot_load_python_objects(base):
    args = dschat.PPOConfig(reward_workers=2)
    with pytest.raises(ValueError, match="reward_workers are processes that load"):
        dschat.PPOTrainer(base, args, ROWS, value_model=base, reward_funcs=length)
    dschat.PPOTrainer(base, args, ROWS, value_model=base, reward_funcs="numeric_match")


def test_a_model_without_a_known_origin_needs_a_tokenizer(model):
    nameless = AutoModelForCausalLM.from_config(model.config)
    nameless.config._name_or_path = nameless.name_or_path = ""
    with pytest.raises(ValueError, match="give it as processing_class"):
        dschat.SFTTrainer(nameless, train_dataset=ROWS)


def test_the_environment_is_set_back_after_a_run(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(trainers, "start_processes", lambda: os.environ.update(RANK="0"))
    with trainers._processes():
        assert os.environ["RANK"] == "0"
    assert "RANK" not in os.environ and os.environ["MASTER_ADDR"] == "host"
