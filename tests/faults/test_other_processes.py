"""A run resumes with another number of processes if an update keeps its number of rows."""

import json
import shutil

import pytest
from test_exact_resume import PPO, SUPERVISED

MODELS = {
    1: "--model_name_or_path {stock}/base/llama --data_split 1,0,0",
    2: "--model_name_or_path {stock}/sft/llama --data_split 0,1,0",
    "dpo": "--model_name_or_path {stock}/sft/llama --data_split 0,1,0",
}
LORA = "--lora_dim 4 --lora_alpha 16 --lora_learning_rate 1e-2"
PPO_LORA = "--actor_lora_dim 4 --critic_lora_dim 4 --only_optimize_lora"


def flags(step: int | str, zero: int, ranks: int, lora: bool) -> str:
    """Return flags of 16 rows per update on any number of ranks."""
    if step in MODELS:
        rows = f"--per_device_train_batch_size {8 // ranks} --gradient_accumulation_steps 2"
        return f"{SUPERVISED} {MODELS[step]} --zero_stage {zero} {rows} {LORA if lora else ''}"
    rows = f"--per_device_generation_batch_size 4 --generation_batches {4 // ranks}"
    rows = f"{rows} --per_device_training_batch_size {8 // ranks}"
    stages = f"--actor_zero_stage {zero} --critic_zero_stage {zero}"
    ppo = PPO.replace("--unsupervised_dataset_name {stock}/texts.jsonl --unsup_coef 0.1", "")
    return f"{ppo} {rows} {stages} {PPO_LORA if lora else ''}"


CASES = [
    (1, 2, (2, 1), False),
    (2, 3, (2, 1), True),
    (3, 2, (1, 2), False),
    (1, 0, (1, 2), False),
    ("dpo", 3, (1, 2), True),
]
MORE_CASES = [
    (1, 3, (1, 2), True),
    (2, 2, (1, 2), True),
    (3, 3, (2, 1), True),
    (3, 0, (2, 1), True),
    (2, 3, (1, 2), False),
]
MORE_CASES += [("dpo", 2, (2, 1), False), ("dpo", 0, (1, 2), True)]


def case(step: int | str, zero: int, ranks: tuple[int, int], lora: bool, *marks):
    name = f"step{step}-zero{zero}-{ranks[0]}to{ranks[1]}" + ("-lora" if lora else "")
    return pytest.param(step, zero, ranks, lora, id=name, marks=marks)


PARAMS = [case(*row) for row in CASES] + [case(*row, pytest.mark.slow) for row in MORE_CASES]


@pytest.mark.parametrize("step, zero, ranks, lora", PARAMS)
def test_other_rank_counts_load_the_exact_weights_and_train_alike(
    step, zero, ranks, lora, zygote, tmp_path
):
    first, second = ranks
    argv = {number: flags(step, zero, number, lora) for number in ranks}
    short = {number: words.replace("_steps 12", "_steps 5") for number, words in argv.items()}
    saved = zygote.run(step, tmp_path / "short", short[first], ranks=first)
    assert saved.statuses == [0] * first, saved.log[-3000:]
    weights = saved.weights()  # before the next run writes its own there
    loaded = zygote.run(step, tmp_path / "short", f"{short[second]} --resume latest", ranks=second)
    assert loaded.statuses == [0] * second, loaded.log[-3000:]
    assert loaded.weights() == weights and len(weights) > 10
    assert loaded.checkpoints() == ["latest", "step_00000005"]
    killed = zygote.run(step, tmp_path / "out", argv[first], ranks=first, kill_in_step=7)
    assert killed.metrics()[-1]["step"] == 6
    resumed = zygote.run(step, tmp_path / "out", f"{argv[second]} --resume latest", ranks=second)
    assert resumed.statuses == [0] * second, resumed.log[-3000:]
    assert [line["step"] for line in resumed.metrics()] == list(range(13))
    if step in MODELS:  # answers are sampled by each process for itself
        whole = zygote.run(step, tmp_path / "whole", argv[first], ranks=first)
        for ours, theirs in zip(resumed.metrics(), whole.metrics(), strict=True):
            assert {k for k, v in ours.items() if v is None} == {
                k for k, v in theirs.items() if v is None
            }
            known = {key: value for key, value in theirs.items() if value is not None}
            known.pop("train/real_tokens", None)  # padding depends on the rows of a micro-batch
            assert {key: ours[key] for key in known} == pytest.approx(known, rel=2e-4, abs=1e-6)


def test_a_step_of_another_size_is_refused(zygote, tmp_path):
    argv = flags(1, 0, 1, False)
    zygote.run(1, tmp_path / "out", argv, kill_in_step=7)
    run = zygote.run(1, tmp_path / "out", f"{argv} --resume latest", ranks=2)
    assert run.statuses == [1, 1]
    message = (
        "each update of that run had 16 rows (world size 1), and now has 32 (world size 2 x 8 "
        "rows x 2 batches)"
    )
    assert "--resume latest" in run.log and message in run.log, run.log[-3000:]


def test_other_flags_are_refused_all_at_once(zygote, tmp_path):
    argv = flags(1, 0, 1, False)
    zygote.run(1, tmp_path / "out", argv, kill_in_step=7)
    other = argv.replace("--learning_rate 1e-2", "--learning_rate 1e-3 --seed 7").replace(
        "--save_interval 5", ""
    )
    run = zygote.run(1, tmp_path / "out", f"{other} --resume latest")
    assert run.statuses == [1]
    assert "--learning_rate was 0.01 and is 0.001; --seed was 1234 and is 7" in run.log, run.log[
        -3000:
    ]
    assert "save_interval was" not in run.log
    again = zygote.run(1, tmp_path / "out", argv)
    assert (
        again.statuses == [1]
        and f"--output_dir {tmp_path}/out holds checkpoints up to update 5" in again.log
    )
    less = zygote.run(
        1,
        tmp_path / "out",
        argv.replace("{stock}/toy", "{stock}/toy {stock}/toy") + " --resume latest",
    )
    assert "--data_path was" in less.log


def test_other_rows_under_the_same_path_are_refused(stock, zygote, tmp_path):
    data = shutil.copytree(stock / "toy", tmp_path / "toy")
    argv = flags(1, 0, 1, False).replace("{stock}/toy", str(data))
    zygote.run(1, tmp_path / "out", argv, kill_in_step=7)
    lines = (data / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[0]["chosen"], rows[1]["chosen"] = rows[1]["chosen"], rows[0]["chosen"]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = zygote.run(1, tmp_path / "out", f"{argv} --resume latest")
    assert run.statuses == [1]
    assert "--resume latest: the run had as many training rows, but their content" in run.log
    (data / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
    again = zygote.run(1, tmp_path / "out", f"{argv} --resume latest")
    assert again.statuses == [0], again.log[-3000:]
