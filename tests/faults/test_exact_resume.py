"""A killed and resumed run equals an unbroken one: weights and metrics to the bit."""

from pathlib import Path

import pytest
from covers import pairwise, product

HOOKS = Path(__file__).with_name("hooks.py")
STEPS, KILLED_IN, SAVED_EVERY = 12, 7, 5
AXES = {"step": (1, 2, "dpo", 3), "zero": (0, 2, 3), "ranks": (1, 2), "lora": (False, True)}
SUPERVISED = (
    "--data_path {stock}/toy --max_seq_len 48 --max_train_steps 12 --learning_rate 1e-2 "
    "--dtype fp32 --save_interval 5 "
    "--num_warmup_steps 3 --weight_decay 0.1 --per_device_eval_batch_size 8"
)
# 64 prompts and 12 rollouts of 8 or 16 are more than one pass: the run is killed in a later one.
PPO = (
    "--actor_model_name_or_path {stock}/sft/llama --critic_model_name_or_path {stock}/reward/llama "
    "--data_path {stock}/toy --data_split 0,0,1 --max_prompt_seq_len 24 --max_answer_seq_len 6 "
    "--max_train_steps 12 "
    "--per_device_generation_batch_size 4 --generation_batches 2 "
    "--per_device_training_batch_size 4 "
    "--actor_learning_rate 1e-3 --critic_learning_rate 1e-3 --num_warmup_steps 3 --dtype fp32 "
    "--save_interval 5 "
    "--kl_target 0.5 --kl_horizon 100 --eval_prompts 8 --eval_interval 4 "
    "--enable_ema --unsupervised_dataset_name {stock}/texts.jsonl --unsup_coef 0.1"
)


def flags(options: dict) -> str:
    zero, lora = options["zero"], options["lora"]
    if options["step"] == 3:
        adapters = "--actor_lora_dim 4 --critic_lora_dim 4 --only_optimize_lora" if lora else ""
        hybrid = "--enable_hybrid_engine" if options["ranks"] == 2 or lora else ""
        return f"{PPO} --actor_zero_stage {zero} --critic_zero_stage {zero} {adapters} {hybrid}"
    # OPT has dropout, so that random numbers matter; accumulation and two passes are in it too.
    model = "--model_name_or_path {stock}/base/opt --dropout 0.1 --data_split " + (
        "1,0,0" if options["step"] == 1 else "0,1,0"
    )
    rows = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    adapters = "--lora_dim 4 --lora_learning_rate 1e-2" if lora else ""
    if options["step"] == "dpo" and lora:
        # The reference is then the trained model, but must not use its dropout.
        adapters += " --only_optimize_lora"
    if options["step"] == 2 and lora:
        # A small buffer, so that the run is killed and saved within one of several blocks.
        rows += " --streaming --shuffle_buffer 40 --eval_fraction 0.4"
    return f"{SUPERVISED} {model} {rows} --zero_stage {zero} {adapters}"


def params() -> list:
    few = [tuple(row.items()) for row in pairwise(AXES)]
    return [
        pytest.param(
            row,
            id=f"step{row['step']}-zero{row['zero']}-ranks{row['ranks']}"
            + ("-lora" if row["lora"] else ""),
            marks=[] if tuple(row.items()) in few else [pytest.mark.slow],
        )
        for row in product(AXES)
    ]


@pytest.mark.parametrize("options", params())
def test_a_killed_run_resumes_exactly(options, zygote, tmp_path, record):
    step = options["step"]
    ranks = options["ranks"]
    argv = flags(options)
    whole = zygote.run(step, tmp_path / "whole", argv.replace("--save_interval 5", ""), ranks=ranks)
    assert whole.statuses == [0] * ranks, whole.log[-3000:]
    killed = zygote.run(step, tmp_path / "killed", argv, ranks=ranks, kill_in_step=KILLED_IN)
    assert killed.statuses == [-9] * ranks, killed.log[-3000:]
    assert killed.metrics()[-1]["step"] == KILLED_IN - 1 and not killed.weights()
    resumed = zygote.run(step, tmp_path / "killed", f"{argv} --resume latest", ranks=ranks)
    assert resumed.statuses == [0] * ranks, resumed.log[-3000:]
    unit = "rollout" if step == 3 else "update"
    assert f"resuming after {unit} {SAVED_EVERY}" in resumed.log
    assert [line["step"] for line in whole.metrics()] == list(range(STEPS + 1))
    assert resumed.metrics() == whole.metrics()
    assert resumed.weights() == whole.weights() and len(whole.weights()) > 10
    assert resumed.checkpoints() == ["latest", "step_00000005", "step_00000010"]
    assert evaluations(resumed) == evaluations(whole)
    record(injected=1, survived=1, **resumed.lost(whole))


@pytest.mark.parametrize("zero", [1, 3])
def test_the_loss_scale_is_resumed(zero, zygote, tmp_path, record):
    """From 2^20 on, fp16 loses its first updates to overflows; resuming at 2^20 would lose as many
    more.
    """
    half = {"before": f"{HOOKS}:half_precision"}
    scaling = tmp_path / "scaling.json"
    scaling.write_text('{"fp16": {"enabled": true, "initial_scale_power": 20, "hysteresis": 1}}')
    argv = flags({"step": 1, "zero": zero, "ranks": 1, "lora": False}).replace(
        "--dtype fp32", "--dtype fp16"
    )
    argv += f" --deepspeed_config {scaling}"
    whole = zygote.run(1, tmp_path / "whole", argv.replace("--save_interval 5", ""), **half)
    assert whole.statuses == [0], whole.log[-3000:]
    lost = [line["step"] for line in whole.metrics()[1:] if line["train/grad_norm"] is None]
    assert lost == list(range(1, len(lost) + 1)) and 3 <= len(lost) <= SAVED_EVERY
    assert zygote.run(1, tmp_path / "killed", argv, kill_in_step=KILLED_IN, **half).statuses == [-9]
    resumed = zygote.run(1, tmp_path / "killed", f"{argv} --resume latest", **half)
    assert resumed.statuses == [0], resumed.log[-3000:]
    assert resumed.metrics() == whole.metrics() and resumed.weights() == whole.weights()
    record(injected=1, survived=1, **resumed.lost(whole))


def evaluations(run) -> dict[str, str]:
    """Return the answers that PPO wrote, by file."""
    return {file.name: file.read_text() for file in (run.out / "evaluation").glob("*")}
