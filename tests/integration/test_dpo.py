"""DPO by its main: the reference is the start, numbers equal a plain loop's, pairs are learned."""

import json
import math
from pathlib import Path

import pytest
import torch
from launches import Case
from outputs import check_changes, load_plainly
from transformers import AutoTokenizer

BETA = 0.1  # the default
LORA = "--lora_dim 4 --lora_alpha 16 --lora_learning_rate 1e-2"
ONLY_LORA = f"{LORA} --only_optimize_lora"
PIECES = "--zero_stage 3 --deepspeed_config {stock}/pieces.json"
# Family, and flags. 16 held-out pairs in batches of 3 on 2 processes: the last batch wraps around.
RUNS = {
    "zero0": ("llama", "--zero_stage 0 --enable_tensorboard --tensorboard_path {out}/events"),
    "zero1-fp16": ("llama", "--zero_stage 1 --dtype fp16 --deepspeed_config {stock}/fp16.json"),
    "zero2-bf16": ("opt", "--zero_stage 2 --dtype bf16 --gradient_checkpointing"),
    "zero3-bf16-only-lora": ("llama", f"{PIECES} {ONLY_LORA} --dtype bf16"),
    "zero2": ("gpt2", "--zero_stage 2 --gradient_checkpointing --gradient_accumulation_steps 2"),
    "zero3": ("opt", f"{PIECES} --add_eot_token"),
    "zero2-offloaded-reference": (
        "llama",
        "--zero_stage 2 --offload_reference_model --label_smoothing 0.1",
    ),
    "zero3-offloaded-both": ("llama", f"{PIECES} --offload --offload_reference_model"),
    "lora": ("gpt_neox", f"--zero_stage 2 {LORA}"),
    "only-lora": ("llama", f"--zero_stage 0 {ONLY_LORA} --offload_reference_model"),
    "only-lora-apart": ("llama", f"--zero_stage 0 {ONLY_LORA} --no_share_reference"),
    # GPT-2's adapters learn little from small batches in so few updates.
    "only-lora-zero3": (
        "gpt2",
        f"{PIECES} {ONLY_LORA} --lora_learning_rate 5e-3 --gradient_checkpointing "
        "--per_device_train_batch_size 16",
    ),
    "only-lora-int8-apart": (
        "llama",
        f"{PIECES} {ONLY_LORA} --no_share_reference --enable_mixed_precision_lora",
    ),
}
COMMON = (
    "--data_path {stock}/toy --data_split 0,1,0 --max_seq_len 48 --dtype fp32 "
    "--per_device_train_batch_size 4 "
    "--per_device_eval_batch_size 3 --learning_rate 1e-3 --max_train_steps 4 --eval_interval 2"
)
CASES = {
    name: Case(
        f"dpo-{name}",
        ranks=2,
        step="dpo",
        argv=f"--model_name_or_path {{stock}}/sft/{family} {COMMON} {flags}",
    )
    for name, (family, flags) in RUNS.items()
}


def each(names):
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.cases(CASES[n])) for n in names]
    )


def toy_rows(stock: Path) -> list[dict]:
    return [json.loads(line) for line in (stock / "toy" / "eval.jsonl").read_text().splitlines()]


def plain_logprobs(folder: Path, tokenizer, rows: list[dict]) -> torch.Tensor:
    """Return [N, 2] float64 of chosen and rejected answers with end token, by transformers, one at
    a time.
    """
    model = load_plainly(folder).double()
    found = []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        for answer in (row["chosen"], row["rejected"]):
            ids = torch.tensor(
                [tokenizer(row["prompt"] + answer)["input_ids"] + [tokenizer.eos_token_id]]
            )
            with torch.no_grad():
                table = model(ids).logits[0, :-1].log_softmax(-1)
            found.append(table.gather(-1, ids[0, 1:, None])[start - 1 :].sum())
    return torch.stack(found).view(-1, 2)


@each(CASES)
def test_the_run_begins_at_log_2_and_its_reference_stays(name, launches):
    outcome = launches[CASES[name]]
    lines = [line for line in outcome.metrics() if "eval/loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    # Policy and reference are one model at the start, to the bit.
    assert (lines[0]["eval/margin"], lines[0]["eval/chosen_reward"], lines[0]["eval/accuracy"]) == (
        0,
        0,
        0,
    )
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-7)
    first = outcome.metrics()[1]
    assert (
        first["train/loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margin"] == 0
    )
    for answer in ("chosen", "rejected"):
        ref_logprobs = [
            line[f"eval/{answer}_logprob"] - line[f"eval/{answer}_reward"] / BETA for line in lines
        ]
        assert ref_logprobs == pytest.approx([ref_logprobs[0]] * 3, rel=1e-5)
    assert lines[-1]["eval/margin"] > 0.05 and lines[-1]["eval/loss"] < lines[0]["eval/loss"] - 0.02


@pytest.mark.cases(CASES["zero0"])
def test_tensorboard_has_the_metrics_and_the_engine_of_step_2(launches):
    events = launches[CASES["zero0"]].out / "events"
    found = {path.parent.relative_to(events).as_posix() for path in events.rglob("events.out.*")}
    assert found == {"step2_tensorboard_logs", "ds_tensorboard_logs/step2_model_tensorboard"}


@each(name for name in CASES if not any(word in name for word in ("int8", "bf16", "fp16")))
def test_the_numbers_and_the_saved_model_are_those_of_a_plain_loop(name, launches, stock):
    family, flags = RUNS[name]
    outcome = launches[CASES[name]]
    start = stock / "sft" / family
    tokenizer = AutoTokenizer.from_pretrained(outcome.out)
    rows = toy_rows(stock)
    logprobs = plain_logprobs(outcome.out, tokenizer, rows)
    reported = outcome.metrics()[-1]
    assert logprobs.mean(0).tolist() == pytest.approx(
        [reported["eval/chosen_logprob"], reported["eval/rejected_logprob"]], rel=1e-4
    )
    if "--add_eot_token" not in flags:  # else the start has no such token yet
        rewards = BETA * (logprobs - plain_logprobs(start, tokenizer, rows))
        assert rewards.mean(0).tolist() == pytest.approx(
            [reported["eval/chosen_reward"], reported["eval/rejected_reward"]], rel=1e-3, abs=1e-4
        )
        margin = rewards[:, 0] - rewards[:, 1]
        smoothing = 0.1 if "--label_smoothing 0.1" in flags else 0.0
        right = torch.sigmoid(margin).log()
        wrong = torch.sigmoid(-margin).log()
        loss = -(1 - smoothing) * right - smoothing * wrong
        assert loss.mean().item() == pytest.approx(reported["eval/loss"], rel=1e-4)
        assert margin.mean().item() == pytest.approx(reported["eval/margin"], rel=1e-3)
        assert (margin > 0).double().mean().item() == reported["eval/accuracy"]
    lora = ""
    if "--only_optimize_lora" in flags:
        lora = "only-lora"
    elif "--lora_dim" in flags:
        lora = "lora"
    check_changes(load_plainly(outcome.out), start, lora=lora, exact=True)
    assert (outcome.out / "adapter").is_dir() == (lora == "only-lora")


@pytest.mark.cases(CASES["only-lora"], CASES["only-lora-apart"])
def test_sharing_the_reference_changes_no_number(launches):
    shared, apart = (launches[CASES[name]].metrics() for name in ("only-lora", "only-lora-apart"))
    for key in ("train/loss", "rewards/margin", "logprobs/rejected", "eval/loss", "eval/margin"):
        pairs = [(a[key], b[key]) for a, b in zip(shared, apart) if key in a]
        assert len(pairs) >= 3 and all(
            a == pytest.approx(b, rel=1e-6, abs=1e-7) for a, b in pairs
        ), key


LEARNING = Case(
    "dpo-learning",
    ranks=2,
    step="dpo",
    argv="--model_name_or_path {stock}/base/llama --data_path {stock}/toy --data_split 0,1,0 "
    "--max_seq_len 48 --dtype fp32 "
    "--per_device_train_batch_size 8 --num_train_epochs 6 --learning_rate 2e-3 --zero_stage 2",
)


@pytest.mark.cases(LEARNING)
def test_held_out_pairs_are_ranked_correctly(launches, stock):
    outcome = launches[LEARNING]
    tokenizer = AutoTokenizer.from_pretrained(outcome.out)
    rows = toy_rows(stock)
    before, after = (
        plain_logprobs(path, tokenizer, rows) for path in (stock / "base" / "llama", outcome.out)
    )
    # A random model prefers either answer. The log-probabilities themselves change sides, not only
    # those relative to the reference.
    wrong = before[:, 0] < before[:, 1]
    assert 4 <= wrong.sum() <= 12
    right = after[:, 0] > after[:, 1]
    assert right[wrong].double().mean() >= 0.75 and right[~wrong].all()
    accuracy, loss = outcome.per_step("eval/accuracy"), outcome.per_step("eval/loss")
    assert len(accuracy) == 7 and accuracy[-1] == 1.0 and min(accuracy[1:]) > 0.85
    assert loss == sorted(loss, reverse=True) and loss[-1] < 0.35


BLOOM = Case(
    "dpo-bloom",
    ranks=2,
    function="dpo_checks.py:bloom",
    kwargs={
        "stock": "{stock}",
        "out": "{out}",
        "argv": f"{COMMON} {ONLY_LORA} --gradient_checkpointing --zero_stage 2",
    },
)


@pytest.mark.cases(BLOOM)
def test_a_model_called_bigscience_bloom_is_no_special_case(launches):
    lines = (launches[BLOOM].out / "dpo" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["eval/margin"] > 0
    assert (launches[BLOOM].out / "dpo" / "model.safetensors").exists()
