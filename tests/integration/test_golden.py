"""Golden numbers of one small run of each step.

A change that is meant to change them writes new ones, and its commit says why:

    DSCHAT_WRITE_GOLDEN=1 python -m pytest tests/integration/test_golden.py
"""

import json
import os
from pathlib import Path

import pytest
from launches import Case

GOLDEN = Path(__file__).with_name("golden.json")
COMMON = "--data_path {stock}/toy --dtype fp32 --lr_scheduler_type constant --num_warmup_steps 0"
SUPERVISED = (
    "--model_name_or_path {stock}/base/llama --max_seq_len 48 --per_device_train_batch_size 8 "
    "--max_train_steps 4 "
    "--learning_rate 1e-3"
)
RUNS = {
    "sft": (
        Case("golden-sft", step=1, argv=f"--data_split 1,0,0 {SUPERVISED} {COMMON}"),
        ("train/loss", "eval/loss"),
    ),
    "reward": (
        Case("golden-reward", step=2, argv=f"--data_split 0,1,0 {SUPERVISED} {COMMON}"),
        ("train/loss", "eval/loss", "eval/margin", "eval/accuracy"),
    ),
    "dpo": (
        Case(
            "golden-dpo",
            step="dpo",
            argv=f"--data_split 0,1,0 {SUPERVISED} {COMMON} --label_smoothing 0.1",
        ),
        (
            "train/loss",
            "rewards/margin",
            "logprobs/chosen",
            "eval/loss",
            "eval/margin",
            "eval/rejected_reward",
        ),
    ),
    "ppo": (
        Case(
            "golden-ppo",
            step=3,
            argv="--actor_model_name_or_path {stock}/base/llama "
            "--critic_model_name_or_path {stock}/reward-base/llama "
            "--data_split 0,0,1 --max_prompt_seq_len 24 --max_answer_seq_len 6 --max_train_steps 3 "
            "--per_device_generation_batch_size 8 --per_device_training_batch_size 4 "
            "--ppo_epochs 2 "
            "--per_device_eval_batch_size 32 "
            f"--actor_learning_rate 1e-3 --critic_learning_rate 1e-3 {COMMON}",
        ),
        (
            *(
                "objective/score",
                "objective/kl",
                "objective/entropy",
                "policy/loss",
                "policy/approx_kl",
                "value/loss",
            ),
            *("value/explained_variance", "response/length_mean", "eval/score", "eval/kl"),
        ),
    ),
}


@pytest.mark.parametrize(
    "name, case, keys",
    [pytest.param(n, c, k, id=n, marks=pytest.mark.cases(c)) for n, (c, k) in RUNS.items()],
)
def test_golden_numbers(name, case, keys, launches):
    found = {key: launches[case].per_step(key) for key in keys}
    assert all(found.values())
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("DSCHAT_WRITE_GOLDEN"):
        golden[name] = {
            key: [float(f"{value:.7g}") for value in values] for key, values in found.items()
        }
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
        pytest.skip(f"wrote the {name} part of {GOLDEN.name}")
    for key in keys:
        assert found[key] == pytest.approx(golden[name][key], rel=1e-3, abs=1e-5), key
