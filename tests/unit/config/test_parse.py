"""Parsing of flags and files: DeepSpeed-Chat's names and defaults, and messages to users."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import yaml

from dschat.config import options
from dschat.config.chat import ChatConfig
from dschat.config.dpo import DPOConfig
from dschat.config.eval_tools import PromptEvalConfig, RewardEvalConfig
from dschat.config.parse import config_dict, parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig

# DeepSpeed-Chat's defaults, flag by flag.
COMMON = {
    "data_path": ["Dahoas/rm-static"],
    "data_split": "2,4,4",
    "data_output_path": "/tmp/data_files/",
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "output_dir": None,
    "seed": 1234,
    "local_rank": -1,
    "offload": False,
    "dtype": "fp16",
    "only_optimize_lora": False,
    "compute_fp32_loss": False,
    "enable_tensorboard": False,
    "add_eot_token": False,
    "deepspeed": False,
    "deepspeed_config": None,
    "deepscale": False,
    "deepscale_config": None,
}
ONE_MODEL = {
    **COMMON,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "max_seq_len": 512,
    "weight_decay": 0.0,
    "num_warmup_steps": 0,
    "gradient_checkpointing": False,
    "dropout": None,
    "zero_stage": 0,
    "lora_dim": 0,
    "lora_module_name": "decoder.layers.",
    "lora_learning_rate": 5e-4,
}
STEP1 = {
    **ONE_MODEL,
    "learning_rate": 1e-3,
    "sft_only_data_path": [],
    "tensorboard_path": "step1_tensorboard",
    "eot_token": "<|endoftext|>",
    "print_loss": False,
}
STEP2 = {
    **ONE_MODEL,
    "learning_rate": 5e-5,
    "num_padding_at_beginning": 1,
    "eval_interval": 0,
    "eval_iters": 100,
    "center_rewards_coef": 0.0,
    "tensorboard_path": "step2_tensorboard",
}
DPO = {
    **ONE_MODEL,
    "learning_rate": 1e-3,
    "beta": 0.1,
    "label_smoothing": 0.0,
    "loss_type": "sigmoid",
    "offload_reference_model": False,
    "tensorboard_path": "step2_tensorboard",
    "print_loss": False,
}
STEP3 = {
    **COMMON,
    "seed": None,
    "unsupervised_dataset_name": None,
    "unsupervised_dataset_config_name": None,
    "unsup_coef": 27.8,
    "num_padding_at_beginning": 1,
    "preprocessing_num_workers": None,
    "per_device_generation_batch_size": 16,
    "per_device_training_batch_size": 16,
    "generation_batches": 1,
    "ppo_epochs": 1,
    "max_prompt_seq_len": 256,
    "max_answer_seq_len": 256,
    "actor_learning_rate": 9.65e-6,
    "critic_learning_rate": 5e-6,
    "actor_weight_decay": 0.0,
    "critic_weight_decay": 0.0,
    "num_warmup_steps": 100,
    "enable_hybrid_engine": False,
    "unpin_actor_parameters": False,
    "release_inference_cache": False,
    "inference_tp_size": 1,
    "tp_gather_partition_size": 8,
    "offload_reference_model": False,
    "offload_reward_model": False,
    "actor_zero_stage": 0,
    "critic_zero_stage": 0,
    "actor_gradient_checkpointing": False,
    "critic_gradient_checkpointing": False,
    "actor_dropout": None,
    "critic_dropout": None,
    "actor_lora_dim": 0,
    "actor_lora_module_name": "decoder.layers.",
    "critic_lora_dim": 0,
    "critic_lora_module_name": "decoder.layers.",
    "actor_lora_learning_rate": 5e-4,
    "critic_lora_learning_rate": 5e-4,
    "enable_ema": False,
    "enable_mixed_precision_lora": False,
    "tensorboard_path": "step3_tensorboard",
    "align_overflow": False,
    "print_answers": False,
    "print_answers_interval": 1,
    "enable_test_mode": False,
    "test_stop_step": 0,
}
# Our defaults that differ; docs/differences_from_deepspeed_chat.md explains why.
OURS = {
    "dtype": "auto",
    "data_output_path": None,
    "lora_module_name": None,
    "actor_lora_module_name": None,
    "critic_lora_module_name": None,
    "seed": 1234,
}
DPO_OURS = {"learning_rate": 1e-6, "dropout": 0.0}
# Values other than the default, for flags whose type is not enough to make one up.
OTHER = {
    "data_path": ["a.jsonl", "b/c"],
    "sft_only_data_path": ["a.jsonl"],
    "data_split": "1,1,8",
    "dtype": "bf16",
    "lr_scheduler_type": "linear",
    "zero_stage": 3,
    "actor_zero_stage": 3,
    "critic_zero_stage": 1,
    "dropout": 0.1,
    "actor_dropout": 0.1,
    "critic_dropout": 0.1,
    "preprocessing_num_workers": 2,
    "per_device_generation_batch_size": 32,
    "per_device_training_batch_size": 8,
    "generation_batches": 2,
    "gradient_accumulation_steps": 2,
    "lora_dim": 8,
    "actor_lora_dim": 8,
    "critic_lora_dim": 8,
    "label_smoothing": 0.2,
    "loss_type": "robust",
}
STEPS = {
    "step 1": (SFTConfig, STEP1, {"model_name_or_path": "m"}),
    "step 2": (RewardConfig, STEP2, {"model_name_or_path": "m"}),
    "DPO": (DPOConfig, DPO, {"model_name_or_path": "m"}),
    "step 3": (
        PPOConfig,
        STEP3,
        {"actor_model_name_or_path": "a", "critic_model_name_or_path": "c"},
    ),
}


def ours(step: str) -> dict:
    """Return our defaults of a step's flags."""
    differing = {**OURS, **(DPO_OURS if step == "DPO" else {})}
    return {name: differing.get(name, value) for name, value in STEPS[step][1].items()}


def words(values: dict) -> list[str]:
    """Return the command line that sets `values`; True is a flag without a value."""
    found = []
    for key, value in values.items():
        found.append(f"--{key}")
        if value is not True:
            found += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return found


def other_value(name: str, default):
    if name in OTHER:
        return OTHER[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default + 1
    return f"other_{name}"


def parsed(config_class, argv: list[str]) -> dict:
    return config_dict(parse_config(config_class, argv))


def message(config_class, argv: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        parse_config(config_class, argv)
    return str(error.value)


@pytest.mark.parametrize("step", STEPS)
def test_defaults_are_those_of_deepspeed_chat_or_the_listed_ones(step):
    config_class, _, required = STEPS[step]
    found, expected = parsed(config_class, words(required)), ours(step)
    assert {name: found.get(name, "no such flag") for name in expected} == expected


@pytest.mark.parametrize("step", STEPS)
def test_every_flag_is_accepted_and_reaches_its_option(step):
    config_class, _, required = STEPS[step]
    given = {**required, **{name: other_value(name, value) for name, value in ours(step).items()}}
    found = parsed(config_class, words(given))
    assert {name: found[name] for name in given} == given
    assert all(given[name] != value for name, value in ours(step).items())


@pytest.mark.parametrize("step", STEPS)
def test_a_required_model_is_asked_for(step):
    config_class, _, required = STEPS[step]
    assert message(config_class, []) == "\n".join(
        f"--{name} is required: a model folder or a hub id." for name in required
    )


@pytest.mark.parametrize("step", STEPS)
def test_the_warmup_is_a_share_of_the_run_in_every_step(step):
    config_class, _, required = STEPS[step]
    schedule = parse_config(config_class, words({**required, "warmup_ratio": 0.25})).schedule
    assert schedule.warmup_updates(40) == 10
    plain = parse_config(config_class, words(required)).schedule
    assert plain.warmup_ratio is None and plain.warmup_updates(40) == min(
        STEPS[step][1]["num_warmup_steps"], 40
    )


def test_learning_rate_schedules_of_deepspeed_chat_are_accepted():
    for name in (
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
    ):
        argv = ["--model_name_or_path", "m", "--lr_scheduler_type", name]
        assert parse_config(SFTConfig, argv).schedule.lr_scheduler_type == name


def test_old_names_of_the_batch_flags():
    required = words(STEPS["step 3"][2])
    old = [
        "--per_device_train_batch_size=8",
        "--per_device_mini_train_batch_size",
        "4",
        "--generation_batch_numbers",
        "3",
    ]
    batch = parse_config(PPOConfig, required + old).batch
    sizes = (
        batch.per_device_generation_batch_size,
        batch.per_device_training_batch_size,
        batch.generation_batches,
    )
    assert sizes == (8, 4, 3)
    # In steps 1 and 2, --per_device_train_batch_size is the current name of a flag.
    argv = ["--model_name_or_path", "m", "--per_device_train_batch_size", "8"]
    assert parse_config(SFTConfig, argv).batch.per_device_train_batch_size == 8
    assert "--generation_batch_numbers" in message(SFTConfig, ["--generation_batch_numbers", "2"])


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
@pytest.mark.parametrize("step", STEPS)
def test_a_file_gives_the_same_configuration_as_flags(step, suffix, tmp_path):
    config_class, _, required = STEPS[step]
    given = {**required, **{name: other_value(name, value) for name, value in ours(step).items()}}
    path = tmp_path / f"run{suffix}"
    path.write_text(
        json.dumps(given) if suffix == ".json" else yaml.safe_dump(given), encoding="utf-8"
    )
    assert parse_config(config_class, [str(path)]) == parse_config(config_class, words(given))
    # The launcher inserts --local_rank before the user's words.
    assert parse_config(config_class, ["--local_rank=0", str(path)]) == parse_config(
        config_class, words(given)
    )


@pytest.mark.parametrize("step", STEPS)
def test_a_recorded_configuration_is_a_file_for_the_same_run(step, tmp_path):
    config_class, _, required = STEPS[step]
    config = parse_config(config_class, words(required))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_dict(config)), encoding="utf-8")
    assert parse_config(config_class, [str(path)]) == config


def test_files_take_numbers_as_yaml_reads_them_null_false_and_old_names(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "actor_model_name_or_path: a\ncritic_model_name_or_path: c\n"
        "actor_learning_rate: 5e-5\ncritic_dropout: null\n"
        "normalize_reward: false\ngeneration_batch_numbers: 2\ndata_path: [x.jsonl]\n"
    )
    found = parsed(PPOConfig, [str(path)])
    names = (
        "actor_learning_rate",
        "critic_dropout",
        "normalize_reward",
        "generation_batches",
        "data_path",
    )
    assert [found[name] for name in names] == [5e-5, None, False, 2, ["x.jsonl"]]


def test_switches_that_are_on_by_default_can_be_turned_off():
    required = words(STEPS["step 3"][2])
    assert parsed(PPOConfig, required)["normalize_reward"] is True
    assert parsed(PPOConfig, [*required, "--no_normalize_reward"])["normalize_reward"] is False
    assert (
        parsed(PPOConfig, [*required, "--normalize_reward", "false"])["normalize_reward"] is False
    )


BAD_FILES = {
    "missing": ("run.yaml", None, "run.yaml: no such configuration file"),
    "no yaml": ("run.yaml", "a: [", "run.yaml: not readable as YAML"),
    "no json": ("run.json", "{", "run.json: not readable as JSON"),
    "no date": ("run.yaml", "seed: 2024-13-45", "run.yaml: not readable as YAML"),
    "a list": ("run.json", "[1]", "run.json: expected flag names and values, found list"),
    "unknown": (
        "run.yaml",
        "learnin_rate: 1",
        "--learnin_rate: no flag of that name (Step 1, supervised fine-tuning)",
    ),
    "wrong type": (
        "run.yaml",
        "zero_stage: two",
        "run.yaml: argument --zero_stage/--zero-stage: invalid int value: 'two'",
    ),
    "wrong choice": ("run.yaml", "dtype: int8", "argument --dtype: invalid choice: 'int8'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_fault(case, tmp_path):
    name, text, words_of_message = BAD_FILES[case]
    if text is not None:
        (tmp_path / name).write_text(text)
    found = message(SFTConfig, [str(tmp_path / name)])
    assert words_of_message in found and found.startswith(str(tmp_path / name))


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    for name, text in (
        ("run.json", '{"model_name_or_path": "m"}'),
        ("run.yaml", "model_name_or_path: m"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert parse_config(SFTConfig, [str(tmp_path / name)]).model.model_name_or_path == "m"


def test_an_empty_list_in_a_file_is_an_empty_list(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ndata_path: []\nsft_only_data_path: []\n")
    assert message(SFTConfig, [str(path)]) == "--data_path names no data set."
    path.write_text("model_name_or_path: m\nsft_only_data_path: []\n")
    assert parse_config(SFTConfig, [str(path)]).data.sft_only_data_path == []


def test_unknown_flags_are_named_with_the_nearest_known_one():
    found = message(SFTConfig, ["--learnin_rate", "1e-3", "--zero_stag", "2", "--qqqq"])
    assert found.splitlines() == [
        "--learnin_rate: no flag of that name (Step 1, supervised fine-tuning). "
        "Did you mean --learning_rate?",
        "--zero_stag: no flag of that name (Step 1, supervised fine-tuning). "
        "Did you mean --zero_stage?",
        "--qqqq: no flag of that name (Step 1, supervised fine-tuning). --help lists the flags.",
    ]
    # Flags cannot be abbreviated.
    assert "--zero: no flag" in message(SFTConfig, ["--zero", "1"])


def test_a_stray_word_and_a_file_beside_flags(tmp_path):
    assert message(SFTConfig, ["stray"]).startswith("stray: no flag of that name")
    found = message(SFTConfig, ["run.yaml", "--zero_stage", "2"])
    assert (
        found
        == "run.yaml: a configuration file takes no flags beside it. Write them into the file, or "
        "give --config run.yaml."
    )


def test_all_problems_are_reported_at_once():
    argv = [
        "--zero_stage",
        "4",
        "--max_seq_len",
        "1",
        "--lora_dim",
        "-1",
        "--num_train_epochs",
        "-2",
    ]
    assert message(SFTConfig, argv).splitlines() == [
        "--model_name_or_path is required: a model folder or a hub id.",
        "--num_train_epochs -2: must be at least 0.",
        "--zero_stage 4: ZeRO has the stages 0, 1, 2 and 3.",
        "--lora_dim -1: must be at least 0.",
        "--max_seq_len 1: must be at least 2.",
    ]


# Flags of an otherwise good run, and the one line that reports them.
BAD_VALUES = {
    "step 1": [
        ("--eval_fraction 0", "--eval_fraction 0.0: must be above 0."),
        ("--eval_fraction 0.95", "--eval_fraction 0.95: must be between 0.0 and 0.9."),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: must be at least 1."),
        (
            "--output_dir=",
            "--output_dir has no value: give a folder, or leave the flag out to save nothing.",
        ),
        (
            "--seed 99999999999999999999999",
            "--seed 99999999999999999999999: must be between 0 and 4294967295.",
        ),
        ("--seed -1", "--seed -1: must be between 0 and 4294967295."),
        ("--max_train_steps -1", "--max_train_steps -1: must be at least 0."),
        ("--num_warmup_steps -1", "--num_warmup_steps -1: must be at least 0."),
        ("--warmup_ratio 1.5", "--warmup_ratio 1.5: must be between 0.0 and 1.0."),
        (
            "--warmup_ratio 0.1 --num_warmup_steps 10",
            "--warmup_ratio and --num_warmup_steps exclude each other: give one of them.",
        ),
        (
            "--warmup_ratio 0.1 --lr_scheduler_type constant",
            "--lr_scheduler_type constant has no warm-up: give constant_with_warmup, or leave "
            "--warmup_ratio out.",
        ),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: must be at least 1."),
        ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0: must be at least 1."),
        ("--dropout 1.5", "--dropout 1.5: must be between 0.0 and 1.0."),
        ("--learning_rate -1", "--learning_rate -1.0: must be at least 0."),
        ("--data_seed -1", "--data_seed -1: must be between 0 and 4294967295."),
        ("--data_seed 4294967296", "--data_seed 4294967296: must be between 0 and 4294967295."),
        ("--learning_rate nan", "--learning_rate nan: must be a finite number, at least 0."),
        ("--lora_alpha inf", "--lora_alpha inf: must be a finite number, above 0."),
        ("--log_interval_s -1", "--log_interval_s -1.0: must be at least 0."),
        ("--weight_decay -1", "--weight_decay -1.0: must be at least 0."),
        ("--lora_alpha 0", "--lora_alpha 0.0: must be above 0."),
        ("--lora_learning_rate -1", "--lora_learning_rate -1.0: must be at least 0."),
        ("--freeze_layers -1", "--freeze_layers -1: must be at least 0."),
        ("--only_optimize_lora", "--only_optimize_lora needs adapters: give --lora_dim above 0."),
        (
            "--enable_mixed_precision_lora",
            "--enable_mixed_precision_lora keeps the weights that LoRA adapts in int8: "
            "give --lora_dim above 0.",
        ),
        ("--data_path", "--data_path names no data set."),
        ("--eval_iters 0", "--eval_iters 0: must be at least 1."),
    ],
    "step 2": [
        ("--center_rewards_coef -1", "--center_rewards_coef -1.0: must be at least 0."),
        ("--cut_fraction 1.5", "--cut_fraction 1.5: must be between 0.0 and 1.0."),
        ("--eval_interval -1", "--eval_interval -1: must be at least 0."),
        ("--eval_iters 0", "--eval_iters 0: must be at least 1."),
    ],
    "DPO": [
        ("--beta 0", "--beta 0.0: must be above 0."),
        ("--label_smoothing 0.6", "--label_smoothing 0.6: must be between 0.0 and 0.5."),
        (
            "--loss_type ipo --label_smoothing 0.1",
            "--loss_type ipo has no --label_smoothing: leave it out, or give --loss_type sigmoid "
            "or robust.",
        ),
        (
            "--loss_type hinge --label_smoothing 0.1",
            "--loss_type hinge has no --label_smoothing: leave it out, or give --loss_type sigmoid "
            "or robust.",
        ),
        *(
            (
                f"--loss_type robust --label_smoothing {share}",
                "--loss_type robust needs the share of swapped pairs: give --label_smoothing "
                "above 0 and below 0.5.",
            )
            for share in (0, 0.5)
        ),
        ("--eval_iters 0", "--eval_iters 0: must be at least 1."),
        ("--eval_interval -1", "--eval_interval -1: must be at least 0."),
        ("--only_optimize_lora", "--only_optimize_lora needs adapters: give --lora_dim above 0."),
    ],
    "step 3": [
        ("--warmup_ratio -0.1", "--warmup_ratio -0.1: must be between 0.0 and 1.0."),
        (
            "--warmup_ratio 0.1 --num_warmup_steps 0",
            "--warmup_ratio and --num_warmup_steps exclude each other: give one of them.",
        ),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: must be at least 1."),
        ("--actor_zero_stage 4", "--actor_zero_stage 4: ZeRO has the stages 0, 1, 2 and 3."),
        ("--critic_zero_stage -1", "--critic_zero_stage -1: ZeRO has the stages 0, 1, 2 and 3."),
        ("--actor_lora_dim -1", "--actor_lora_dim -1: must be at least 0."),
        ("--critic_lora_dim -1", "--critic_lora_dim -1: must be at least 0."),
        ("--critic_lora_alpha 0", "--critic_lora_alpha 0.0: must be above 0."),
        ("--actor_learning_rate -1", "--actor_learning_rate -1.0: must be at least 0."),
        ("--critic_weight_decay -1", "--critic_weight_decay -1.0: must be at least 0."),
        ("--actor_freeze_layers -1", "--actor_freeze_layers -1: must be at least 0."),
        (
            "--per_device_generation_batch_size 0",
            "--per_device_generation_batch_size 0: must be at least 1.",
        ),
        (
            "--per_device_training_batch_size 0",
            "--per_device_training_batch_size 0: must be at least 1.",
        ),
        ("--generation_batches 0", "--generation_batches 0: must be at least 1."),
        ("--ppo_epochs 0", "--ppo_epochs 0: must be at least 1."),
        ("--max_prompt_seq_len 0", "--max_prompt_seq_len 0: must be at least 1."),
        ("--max_answer_seq_len 0", "--max_answer_seq_len 0: must be at least 1."),
        ("--inference_tp_size 2", "--inference_tp_size 2 needs --actor_zero_stage 3, not 0."),
        (
            "--enable_mixed_precision_lora --critic_lora_dim 8",
            "--enable_mixed_precision_lora keeps the weights that LoRA adapts in int8: "
            "give --actor_lora_dim above 0.",
        ),
        (
            "--only_optimize_lora",
            "--only_optimize_lora needs adapters: give --actor_lora_dim or --critic_lora_dim.",
        ),
        ("--kl_coef -0.1", "--kl_coef -0.1: must be at least 0."),
        ("--kl_target 0", "--kl_target 0.0: must be above 0."),
        ("--kl_horizon 0", "--kl_horizon 0: must be above 0."),
        ("--reward_clip 0", "--reward_clip 0.0: must be above 0."),
        ("--missing_eos_penalty -1", "--missing_eos_penalty -1.0: must be at least 0."),
        ("--cliprange 0", "--cliprange 0.0: must be above 0."),
        ("--cliprange_value 0", "--cliprange_value 0.0: must be above 0."),
        ("--gamma 1.1", "--gamma 1.1: must be between 0.0 and 1.0."),
        ("--lam -0.1", "--lam -0.1: must be between 0.0 and 1.0."),
        ("--entropy_coef -1", "--entropy_coef -1.0: must be at least 0."),
        ("--target_kl 0", "--target_kl 0.0: must be above 0."),
        ("--critic_warmup_steps -1", "--critic_warmup_steps -1: must be at least 0."),
        ("--temperature 0", "--temperature 0.0: must be above 0."),
        ("--top_p 1.5", "--top_p 1.5: must be between 0.0 and 1.0."),
        ("--top_k -1", "--top_k -1: must be at least 0."),
        (
            "--greedy_rollouts --num_samples_per_prompt 4",
            "--greedy_rollouts would give 4 equal answers to each prompt: leave it out, or give "
            "--num_samples_per_prompt 1.",
        ),
        ("--min_answer_len 300", "--min_answer_len 300: must be between 0 and 256."),
        ("--ema_decay 1.5", "--ema_decay 1.5: must be between 0.0 and 1.0."),
        ("--unsup_coef -1", "--unsup_coef -1.0: must be at least 0."),
        ("--eval_interval -1", "--eval_interval -1: must be at least 0."),
        ("--eval_prompts 1", "--eval_prompts 1: must be at least 2."),
        ("--test_stop_step -1", "--test_stop_step -1: must be at least 0."),
        ("--print_answers_interval 0", "--print_answers_interval 0: must be at least 1."),
        ("--save_rollouts -1", "--save_rollouts -1: must be at least 0."),
        ("--save_rollouts 2", "--save_rollouts 2 needs --output_dir."),
    ],
}


@pytest.mark.parametrize(
    ("step", "flags", "line"),
    [(step, *case) for step, cases in BAD_VALUES.items() for case in cases],
)
def test_a_bad_value_is_named_with_its_flag(step, flags, line):
    config_class, _, required = STEPS[step]
    assert message(config_class, words(required) + flags.split()) == line


MODELS = {
    **{config: words(required) for config, _, required in STEPS.values()},
    ChatConfig: ["--path", "m"],
    PromptEvalConfig: ["--model_name_or_path_baseline", "m", "--model_name_or_path_finetune", "n"],
    RewardEvalConfig: ["--model_name_or_path", "m"],
}


def float_flags(config_class) -> list[str]:
    """Return every flag that takes a float, or a list of floats."""
    groups = typing.get_type_hints(config_class).values()
    options = [
        (name, kind) for group in groups for name, kind in typing.get_type_hints(group).items()
    ]
    return [name for name, kind in options if float in (kind, *typing.get_args(kind))]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("config_class", MODELS, ids=lambda config_class: config_class.__name__)
def test_no_flag_accepts_nan_or_infinity(config_class, value):
    flags = float_flags(config_class)
    assert len(flags) >= {
        SFTConfig: 6,
        RewardConfig: 6,
        DPOConfig: 6,
        PPOConfig: 25,
        ChatConfig: 4,
        PromptEvalConfig: 1,
    }.get(config_class, 0)
    for name in flags:
        more = ["--serve"] if name == "max_wait_s" else []
        lines = message(
            config_class, [*MODELS[config_class], *more, f"--{name}={value}"]
        ).splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"--{name} {value}: must "), lines


@pytest.mark.parametrize(
    "step, flags, named",
    [
        ("step 1", "--model_name_or_path base --output_dir base", "--model_name_or_path base"),
        (
            "step 2",
            "--model_name_or_path ./base/ --output_dir x/../base",
            "--model_name_or_path ./base/",
        ),
        (
            "DPO",
            "--model_name_or_path out/adapter --output_dir out",
            "--model_name_or_path out/adapter",
        ),
        ("step 1", "--model_name_or_path link --output_dir base", "--model_name_or_path link"),
        (
            "step 1",
            "--model_name_or_path facebook/opt --output_dir facebook/opt",
            "--model_name_or_path facebook/opt",
        ),
        (
            "step 3",
            "--actor_model_name_or_path out --output_dir out",
            "--actor_model_name_or_path out",
        ),
        (
            "step 3",
            "--actor_model_name_or_path out/actor --output_dir out",
            "--actor_model_name_or_path out/actor",
        ),
        (
            "step 3",
            "--critic_model_name_or_path out/critic --output_dir out/",
            "--critic_model_name_or_path out/critic",
        ),
        (
            "step 3",
            "--reward_model_name_or_path r out/critic --output_dir out",
            "--reward_model_name_or_path out/critic",
        ),
    ],
)
def test_a_model_that_is_read_is_not_overwritten(step, flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base")
    config_class, _, required = STEPS[step]
    (output,) = flags.partition("--output_dir ")[2].split()
    line = (
        f"--output_dir {output}: this run would replace {named}, or write into it. "
        "Give another folder."
    )
    assert message(config_class, words(required) + flags.split()) == line


@pytest.mark.parametrize(
    "step, flags",
    [
        ("step 1", "--model_name_or_path base --output_dir base/out"),
        ("step 1", "--model_name_or_path out/base --output_dir out"),
        ("step 1", "--model_name_or_path out/actor --output_dir out"),
        (
            "step 3",
            "--actor_model_name_or_path models/actor --critic_model_name_or_path models/critic "
            "--output_dir models/3",
        ),
        (
            "step 3",
            "--actor_model_name_or_path first/actor --critic_model_name_or_path first/critic "
            "--output_dir second",
        ),
    ],
)
def test_models_outside_the_written_folders_may_be_read(step, flags):
    config_class, _, required = STEPS[step]
    assert parse_config(config_class, words(required) + flags.split()).run.output_dir


def test_a_tilde_that_no_shell_expanded_is_refused():
    found = message(SFTConfig, "--model_name_or_path m --output_dir ~/out".split())
    assert found == "--output_dir ~/out: give the path in full, without ~."


@pytest.mark.parametrize(
    "flags", ["--zero_stage two", "--dtype int8", "--learning_rate fast", "--offload maybe"]
)
def test_a_value_of_the_wrong_type_is_named_with_its_flag(flags):
    flag, value = flags.split()
    found = message(SFTConfig, ["--model_name_or_path", "m", flag, value])
    assert flag in found and value in found


def test_a_rollout_that_is_no_multiple_of_an_update_is_refused():
    required = words(STEPS["step 3"][2])
    flags = "--per_device_generation_batch_size 6 --generation_batches 2 "
    flags += "--per_device_training_batch_size 8"
    found = message(PPOConfig, required + flags.split())
    assert "12 rows" in found and "8 rows" in found
    for flag in (*flags.split()[::2], "--gradient_accumulation_steps"):
        assert flag in found


def test_derived_sizes_and_the_options_of_each_role():
    required = words(STEPS["step 3"][2])
    flags = "--per_device_generation_batch_size 6 --generation_batches 4 "
    flags += "--per_device_training_batch_size 3 --gradient_accumulation_steps 2 --ppo_epochs 3 "
    flags += "--offload --actor_zero_stage 2 --critic_lora_dim 4 "
    flags += "--only_optimize_lora --critic_lora_learning_rate 0.5 --actor_freeze_layers 1"
    config = parse_config(PPOConfig, required + flags.split())
    assert (config.rollout_rows, config.updates_per_rollout) == (24, 12)
    # Only the critic has adapters, so the actor is trained in full.
    assert (config.actor_lora.only_optimize_lora, config.critic_lora.only_optimize_lora) == (
        False,
        True,
    )
    assert (config.critic_lora.lora_dim, config.critic_lora.lora_learning_rate) == (4, 0.5)
    actor, critic = config.actor_system, config.critic_system
    assert (actor.zero_stage, actor.offload, actor.freeze_layers, actor.dropout) == (
        2,
        True,
        1,
        0.0,
    )
    assert (critic.zero_stage, critic.offload, critic.freeze_layers, critic.dropout) == (
        0,
        True,
        0,
        0.0,
    )


def test_only_models_with_adapters_keep_int8_weights():
    flags = "--enable_mixed_precision_lora --actor_lora_dim 4"
    config = parse_config(PPOConfig, words(STEPS["step 3"][2]) + flags.split())
    assert config.actor_system.enable_mixed_precision_lora
    assert not config.critic_system.enable_mixed_precision_lora


@pytest.mark.parametrize(
    "name, is_accepted",
    [
        ("a/b.py:f", True),
        ("numeric_match", True),
        ("regex_match(pattern='a.b:c\\n')", True),
        ("object:f", True),
        ("a/b.py", False),
        ("a/b.txt:f", False),
        ("object:not a name", False),
        ("b.py:not a name", False),
    ],
)
def test_rewards_are_functions_of_files_or_graders(name, is_accepted):
    argv = [*words(STEPS["step 3"][2]), "--reward_fn", name]
    if is_accepted:
        assert parse_config(PPOConfig, argv).model.reward_fn == [name]
        return
    with pytest.raises(ValueError, match="--reward_fn .*: expected file.py:function, or a grader"):
        parse_config(PPOConfig, argv)


def test_a_time_limit_of_rewards_needs_workers():
    argv = [*words(STEPS["step 3"][2]), *"--reward_fn a.py:f --reward_timeout_s 5".split()]
    with pytest.raises(ValueError, match="--reward_timeout_s 5 needs --reward_workers"):
        parse_config(PPOConfig, argv)
    model = parse_config(PPOConfig, [*argv, "--reward_workers", "2"]).model
    assert (model.reward_timeout_s, model.reward_workers) == (5.0, 2)


@pytest.mark.parametrize(
    "flags, reference, reward",
    [
        ("--actor_lora_dim 4 --critic_lora_dim 4", False, False),
        ("--actor_lora_dim 4 --only_optimize_lora", True, False),
        ("--critic_lora_dim 4 --only_optimize_lora", False, True),
        ("--actor_lora_dim 4 --critic_lora_dim 4 --only_optimize_lora", True, True),
        (
            "--actor_lora_dim 4 --critic_lora_dim 4 --only_optimize_lora --no_share_reference",
            False,
            True,
        ),
        (
            "--actor_lora_dim 4 --critic_lora_dim 4 --only_optimize_lora --no_share_reward",
            True,
            False,
        ),
        (
            "--critic_lora_dim 4 --only_optimize_lora --reward_model_name_or_path other",
            False,
            False,
        ),
        ("--critic_lora_dim 4 --only_optimize_lora --reward_fn file.py:f", False, False),
        (
            "--critic_lora_dim 4 --only_optimize_lora --advantage_estimator rloo "
            "--num_samples_per_prompt 2",
            False,
            False,
        ),
    ],
)
def test_models_are_shared_only_if_all_but_the_adapters_is_frozen(flags, reference, reward):
    config = parse_config(PPOConfig, words(STEPS["step 3"][2]) + flags.split())
    assert (config.shares_reference, config.shares_reward) == (reference, reward)


def test_the_documentation_names_every_default_that_differs():
    text = (
        Path(__file__).resolve().parents[3] / "docs" / "differences_from_deepspeed_chat.md"
    ).read_text()
    missing = [name for name in OURS if f"--{name}" not in text]
    assert missing == []
    section = text.partition("\n## DPO\n")[2].partition("\n## ")[0]
    assert [name for name in DPO_OURS if f"`--{name}`" not in section] == []


@pytest.mark.parametrize(
    "words, names",
    [
        ("", []),
        ("--report_to none", []),
        ("--report_to csv,TensorBoard", ["csv", "tensorboard"]),
        ("--report_to csv tensorboard csv", ["csv", "tensorboard"]),
        ("--enable_tensorboard", ["tensorboard"]),
        ("--enable_tensorboard --report_to tensorboard, csv", ["tensorboard", "csv"]),
    ],
)
def test_loggers_are_separated_by_commas_or_spaces(words, names):
    base = "--model_name_or_path m --output_dir out".split()
    assert parse_config(SFTConfig, base + words.split()).run.loggers == names


def test_loggers_that_cannot_be_used_are_named(monkeypatch):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: name == "csv" or None)
    words = "--model_name_or_path m --report_to csv,wandb,comet"
    with pytest.raises(ValueError) as error:
        parse_config(SFTConfig, words.split())
    csv, wandb, comet = str(error.value).splitlines()
    assert "--report_to csv needs --output_dir" in csv
    assert "the package wandb is not installed" in wandb
    assert "--report_to comet: no logger of that name" in comet


@pytest.mark.parametrize(
    "config_class, flags, message",
    [
        (SFTConfig, "--tokens_per_batch 511", "less than one text of --max_seq_len: give 512"),
        (RewardConfig, "--tokens_per_batch 1023", "less than one pair .*: give 1024 or more, or 0"),
        (DPOConfig, "--tokens_per_batch -1", "less than one pair .*: give 1024 or more, or 0"),
        (SFTConfig, "--packing --tokens_per_batch 4096", "exclude each other"),
        (DPOConfig, "--packing --tokens_per_batch 4096", "exclude each other"),
    ],
)
def test_tokens_per_batch_hold_the_longest_row(config_class, flags, message):
    with pytest.raises(ValueError, match=message):
        parse_config(config_class, ["--model_name_or_path", "opt-125m", *flags.split()])


@pytest.mark.parametrize("name", ["--scoring_tokens_per_batch", "--training_tokens_per_batch"])
def test_tokens_of_step_3_hold_the_longest_prompt_and_answer(name):
    flags = "--actor_model_name_or_path opt-125m --critic_model_name_or_path opt-125m"
    with pytest.raises(ValueError, match=f"{name} 511 is less than .* give 512"):
        parse_config(PPOConfig, f"{flags} {name} 511".split())


@pytest.mark.parametrize("step", STEPS)
def test_target_modules_are_checked(step):
    config_class, _, required = STEPS[step]
    prefix = "actor_" if step == "step 3" else ""
    given = {**required, f"{prefix}target_modules": ["q_proj", ".*mlp.*"]}
    assert f"give --{prefix}lora_dim above 0" in message(config_class, words(given))
    given[f"{prefix}lora_dim"] = 4
    config = parse_config(config_class, words(given))
    lora = config.actor_lora if step == "step 3" else config.lora
    assert lora.target_modules == ["q_proj", ".*mlp.*"] and lora.chooses_layers
    assert hash(lora) == hash(dataclasses.replace(lora))
    wrong = {
        **given,
        f"{prefix}target_modules": ["all-linear", "(q_proj"],
        f"{prefix}lora_module_name": "mlp",
    }
    found = message(config_class, words(wrong))
    for part in ("exclude each other", "give no names beside it", "(q_proj: neither a name nor"):
        assert part in found
