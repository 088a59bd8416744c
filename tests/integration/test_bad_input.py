"""A user's mistake ends with one message that names it, before any training."""

import subprocess
from pathlib import Path

import pytest
from launches import MAINS, Case, environment, launcher

SFT = (
    "--model_name_or_path {stock}/base/llama --data_path {stock}/toy --data_split 1,0,0 "
    "--dtype fp32 --max_seq_len 48"
)
REWARD = SFT.replace("1,0,0", "0,1,0")
PPO = (
    "--actor_model_name_or_path {stock}/sft/llama --critic_model_name_or_path {stock}/reward/llama "
    "--data_path {stock}/toy --data_split 0,0,1 --dtype fp32 --max_prompt_seq_len 24 "
    "--max_answer_seq_len 4"
)
OUTSIDE = [
    "with id 303",
    "vocabulary ends with id 263",
    "40 ids are outside",
    "Copy the tokenizer files",
]
UNSEEN = ['unseen.jsonl, line 2: field "prompt" is empty', "at least one word", "--skip_bad_rows"]
HUGE = [
    'huge.jsonl, line 2: field "prompt" has 2,621,440 bytes of text',
    "limit is 1,000,000",
    "split it",
    "--skip_bad_rows",
]
NOT_FINITE = ["faulty/nan-", "holds values that are no finite numbers in float32", "another model"]
POSITIONS = [
    "--max_seq_len 513: --model_name_or_path",
    "has learned 512 positions. Give 512 or less",
]
# One of the three good rows is held out.
LEFT_OUT = ["2 training rows are fewer", "x 65 rows"]
# Step, flags (the last of a kind counts), words of the message, and the number of ranks if not 1.
MISTAKES = {
    "no-data": (
        1,
        f"{SFT} --data_path {{stock}}/none.jsonl",
        ["--data_path", "none.jsonl", "no such file"],
    ),
    "broken-line": (
        1,
        f"{SFT} --data_path {{stock}}/faulty/broken.jsonl",
        ["faulty/broken.jsonl, line 3", "--skip_bad_rows"],
    ),
    "no-pairs": (
        2,
        f"{REWARD} --data_path {{stock}}/faulty/no-pairs.jsonl",
        ["faulty/no-pairs.jsonl", '"rejected"', "step 2"],
    ),
    "no-pairs-for-dpo": (
        "dpo",
        f"{REWARD} --data_path {{stock}}/faulty/no-pairs.jsonl",
        ["faulty/no-pairs.jsonl", '"rejected"', "step 2"],
    ),
    "reward-model-for-dpo": (
        "dpo",
        f"{REWARD} --model_name_or_path {{stock}}/reward/llama",
        ["--model_name_or_path", "is a reward model", "give a causal language model"],
    ),
    "broken-line-but-skipped": (
        2,
        f"{REWARD} --data_path {{stock}}/faulty/no-pairs.jsonl --skip_bad_rows",
        ["--data_split", "--data_path", "no-pairs.jsonl"],
    ),
    "many-faults": (
        2,
        f"{REWARD} --data_path {{stock}}/faulty/many.jsonl",
        [
            *("many.jsonl, line 2: no field", 'line 3: field "prompt" is {"a": 7}, not a string'),
            *(
                'line 4: field "chosen" is empty',
                'line 5: fields "chosen" and "rejected" are equal',
                "line 6: ",
            ),
            *("... and 3 more", "--skip_bad_rows"),
        ],
    ),
    **{
        f"{kind}-prompt-{name}": (step, f"{argv} --data_path {{stock}}/faulty/{kind}.jsonl", words)
        for kind, words, steps in (
            ("unseen", UNSEEN, {"step-1": (1, SFT), "step-3": (3, PPO)}),
            (
                "huge",
                HUGE,
                {
                    "step-1": (1, SFT),
                    "step-2": (2, REWARD),
                    "dpo": ("dpo", REWARD),
                    "step-3": (3, PPO),
                },
            ),
        )
        for name, (step, argv) in steps.items()
    },
    **{
        f"{kind}-prompt-but-skipped": (
            1,
            f"{SFT} --data_path {{stock}}/faulty/{kind}.jsonl --per_device_train_batch_size 65 "
            "--skip_bad_rows",
            LEFT_OUT,
        )
        for kind in ("unseen", "huge")
    },
    "empty-file": (
        1,
        f"{SFT} --data_path {{stock}}/faulty/empty.jsonl",
        ["empty.jsonl: no rows", "--data_path"],
    ),
    "no-utf-8": (
        1,
        f"{SFT} --data_path {{stock}}/faulty/latin.jsonl",
        ["latin.jsonl, line 2: not valid UTF-8", "0xe9"],
    ),
    "few-rows": (
        1,
        f"{SFT} --per_device_train_batch_size 65",
        [
            "64 training rows",
            "world size 1 x 65 rows",
            "--per_device_train_batch_size",
            "--data_path",
        ],
    ),
    "few-rows-for-two": (
        1,
        f"{SFT} --per_device_train_batch_size 33",
        [
            "64 training rows",
            "world size 2 x 33 rows",
            "--per_device_train_batch_size",
            "--data_path",
        ],
        2,
    ),
    "few-prompts": (
        3,
        f"{PPO} --per_device_generation_batch_size 65 --per_device_training_batch_size 65",
        ["64 training rows", "--per_device_generation_batch_size"],
    ),
    "no-shares": (1, f"{SFT} --data_split 0,0,0", ["--data_split 0,0,0", "such as 2,4,4"]),
    **{
        f"no-end-token-{step}": (
            step,
            f"{argv} --{flag} {{stock}}/faulty/no-eos",
            [f"--{flag} '", "no-eos", "end-of-sequence", "--add_eot_token"],
        )
        for step, argv, flag in (
            *(
                (1, SFT, "model_name_or_path"),
                (2, REWARD, "model_name_or_path"),
                ("dpo", REWARD, "model_name_or_path"),
            ),
            (3, PPO, "actor_model_name_or_path"),
        )
    },
    "no-config": (
        1,
        f"{SFT} --model_name_or_path {{stock}}/faulty/no-config",
        ["--model_name_or_path", "no-config", "config.json"],
    ),
    "pickled-weights": (
        1,
        f"{SFT} --model_name_or_path {{stock}}/faulty/pickled",
        [
            "--model_name_or_path",
            "faulty/pickled'",
            "a .bin holds more than tensors, which is refused",
            "safetensors",
        ],
    ),
    "pickled-adapter": (
        1,
        f"{SFT} --model_name_or_path {{stock}}/faulty/pickled-adapter",
        [
            "--model_name_or_path",
            "faulty/pickled-adapter'",
            "adapter_model.safetensors is missing",
            "PEFT",
        ],
    ),
    "pickled-adapter-reward": (
        2,
        f"{REWARD} --model_name_or_path {{stock}}/faulty/pickled-adapter",
        [
            "--model_name_or_path",
            "faulty/pickled-adapter'",
            "adapter_model.safetensors is missing",
            "PEFT",
        ],
    ),
    "pickled-reward": (
        2,
        f"{REWARD} --model_name_or_path {{stock}}/faulty/pickled-reward",
        [
            "--model_name_or_path",
            "faulty/pickled-reward'",
            "a .bin holds more than tensors, which is refused",
        ],
    ),
    "cut-weights": (
        1,
        f"{SFT} --model_name_or_path {{stock}}/faulty/cut",
        ["--model_name_or_path", "faulty/cut'", "A file is damaged", "whole copy"],
    ),
    **{
        f"nan-weights-{name}": (
            step,
            f"{argv} --{flag} {{stock}}/faulty/nan-{kind}",
            [f"--{flag} '", *NOT_FINITE],
        )
        for name, step, argv, flag, kind in (
            ("step-1", 1, SFT, "model_name_or_path", "sft"),
            ("step-2", 2, REWARD, "model_name_or_path", "sft"),
            ("dpo", "dpo", REWARD, "model_name_or_path", "sft"),
            ("actor", 3, PPO, "actor_model_name_or_path", "sft"),
            ("critic", 3, PPO, "critic_model_name_or_path", "reward"),
        )
    },
    "ending-reward": (
        3,
        f"{PPO} --reward_fn {{stock}}/faulty/ending.py:score",
        ["--reward_fn", "does not run: SystemExit"],
    ),
    "output-is-the-model": (
        1,
        f"{SFT} --model_name_or_path {{stock}}/faulty/nan-sft "
        f"--output_dir {{stock}}/faulty/nan-sft",
        ["--output_dir", "this run would replace", "another folder"],
    ),
    "output-is-above-the-actor": (
        3,
        f"{PPO} --actor_model_name_or_path {{stock}}/matrix/actor --output_dir {{stock}}/matrix",
        ["--output_dir", "this run would replace", "another folder"],
    ),
    "positions-step-1": (
        1,
        f"{SFT} --model_name_or_path {{stock}}/base/gpt2 --max_seq_len 513",
        POSITIONS,
    ),
    "positions-step-2": (
        2,
        f"{REWARD} --model_name_or_path {{stock}}/base/opt --max_seq_len 513",
        POSITIONS,
    ),
    "positions-dpo": (
        "dpo",
        f"{REWARD} --model_name_or_path {{stock}}/base/opt --max_seq_len 513",
        POSITIONS,
    ),
    "two-halves": (
        1,
        f"{SFT} --deepspeed_config {{stock}}/faulty/halves.json",
        ["--deepspeed_config", "both enabled"],
    ),
    "endless-rate": (
        2,
        f"{REWARD} --learning_rate inf",
        ["--learning_rate inf: must be a finite number"],
    ),
    "no-reward-file": (
        3,
        f"{PPO} --reward_fn {{stock}}/none.py:f",
        ["--reward_fn", "there is no file", "none.py"],
    ),
    "no-reward-function": (
        3,
        f"{PPO} --reward_fn {{stock}}/faulty/rewards.py:missing",
        ["--reward_fn", "has no function missing"],
    ),
    "no-reward-name": (
        3,
        f"{PPO} --reward_fn {{stock}}/faulty/rewards.py",
        ["--reward_fn", "file.py:function"],
    ),
    "broken-reward-file": (
        3,
        f"{PPO} --reward_fn {{stock}}/faulty/broken.py:f",
        ["--reward_fn", "broken.py does not run: ZeroDivisionError"],
    ),
    "no-checkpoint": (
        1,
        f"{SFT} --resume {{stock}}/none",
        ["--resume", "none", "not a whole checkpoint", "latest"],
    ),
    "save-nowhere": (1, f"{SFT} --save_interval -1", ["--save_interval -1", "at least 0"]),
    "no-share": (1, f"{SFT} --data_split 0,1,1", ["--data_split 0,1,1", "step 1"]),
    "no-model": (
        1,
        f"{SFT} --model_name_or_path {{stock}}/none",
        ["--model_name_or_path", "none", "does not exist"],
    ),
    "no-weights": (
        1,
        f"{SFT} --model_name_or_path {{stock}}/faulty/no-weights",
        ["--model_name_or_path", "no-weights", "model.safetensors"],
    ),
    "no-tokenizer": (
        1,
        f"{SFT} --model_name_or_path {{stock}}/faulty/no-tokenizer",
        ["--model_name_or_path", "no-tokenizer", "tokenizer.json"],
    ),
    "reward-as-sft": (
        1,
        f"{SFT} --model_name_or_path {{stock}}/reward/llama",
        ["reward model", "causal"],
    ),
    "no-such-layer": (
        1,
        f"{SFT} --lora_dim 2 --lora_module_name attn.query",
        ["--lora_module_name", "attn.query", "q_proj"],
    ),
    "too-frozen": (1, f"{SFT} --freeze_layers 9", ["--freeze_layers 9", "2 layers"]),
    "output-is-a-file": (
        1,
        f"{SFT} --output_dir {{stock}}/faulty/file",
        ["--output_dir", "faulty/file"],
    ),
    "no-ds-config": (
        1,
        f"{SFT} --deepspeed_config {{stock}}/none.json",
        ["--deepspeed_config", "none.json"],
    ),
    "no-critic": (
        3,
        f"{PPO} --critic_model_name_or_path {{stock}}/none",
        ["--critic_model_name_or_path", "none"],
    ),
    "sft-as-critic": (
        3,
        f"{PPO} --critic_model_name_or_path {{stock}}/sft/llama",
        ["--critic_model_name_or_path"],
    ),
    "uneven-rollout": (
        3,
        f"{PPO} --per_device_generation_batch_size 6 --per_device_training_batch_size 4",
        ["6 rows", "4 rows", "--per_device_generation_batch_size"],
    ),
    "wide-tokenizer-step-1": (
        1,
        f"{SFT} --model_name_or_path {{stock}}/faulty/wide-sft",
        ["--model_name_or_path", "wide-sft': its tokenizer has the token 'word39'", *OUTSIDE],
    ),
    "wide-tokenizer-step-2": (
        2,
        f"{REWARD} --model_name_or_path {{stock}}/faulty/wide-reward",
        ["--model_name_or_path", "wide-reward': its tokenizer has the token 'word39'", *OUTSIDE],
    ),
    "wide-tokenizer-step-3": (
        3,
        f"{PPO} --actor_model_name_or_path {{stock}}/faulty/wide-sft "
        "--critic_model_name_or_path {stock}/faulty/wide-reward",
        ["--actor_model_name_or_path", "wide-sft': its tokenizer has the token 'word39'", *OUTSIDE],
    ),
    "wide-tokenizer-critic": (
        3,
        f"{PPO} --critic_model_name_or_path {{stock}}/faulty/wide-reward",
        [
            "--critic_model_name_or_path",
            "wide-reward': its tokenizer has the token 'word39'",
            *OUTSIDE,
        ],
    ),
    "two-at-once": (
        2,
        f"{REWARD} --zero_stage 5 --max_seq_len 1",
        ["--zero_stage 5", "--max_seq_len 1"],
    ),
}


def mistake(name: str):
    step, argv, words, *ranks = MISTAKES[name]
    case = Case(f"mistake-{name}", ranks=ranks[0] if ranks else 1, step=step, argv=argv, fails=True)
    return pytest.param(case, words, id=name, marks=pytest.mark.cases(case))


@pytest.mark.parametrize("case, words", [mistake(name) for name in MISTAKES])
def test_a_mistake_is_a_value_error_that_names_it(case, words, launches):
    for result in launches[case].ranks:
        assert not result["ok"] and result["error_type"] == "ValueError", result
        assert [word for word in words if word not in result["error"]] == []
    assert not (launches[case].out / "model.safetensors").exists()
    assert not (launches.stock / "was-run").exists(), "code from a file of weights was run"


def launched(step: int, argv: str, stock: Path) -> subprocess.CompletedProcess:
    """Run a step under the real launcher with two ranks; return stdout and stderr as one."""
    words = [word.format(stock=stock) for word in argv.split()]
    command = [*launcher(2), str(MAINS[step]), *words]
    return subprocess.run(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
        cwd=stock,
    )


@pytest.mark.parametrize(
    "step, argv, message",
    [
        (
            1,
            f"{SFT} --model_name_or_path {{stock}}/none",
            "--model_name_or_path '{stock}/none' does not exist; give",
        ),
        (
            3,
            f"{PPO} --kl_coeff 0.1",
            "--kl_coeff: no flag of that name (Step 3, PPO). Did you mean --kl_coef?",
        ),
    ],
    ids=["missing folder", "unknown flag"],
)
def test_the_message_is_the_last_on_the_screen_of_a_real_launch(step, argv, message, stock):
    done = launched(step, argv, stock)
    assert done.returncode != 0
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith(f"error (rank 0): {message.format(stock=stock)}"), done.stdout[-2000:]
    assert "Traceback" not in done.stdout
