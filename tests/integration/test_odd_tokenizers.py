"""Tokenizers without a padding or beginning token: the steps train as they do with one."""

import pytest
from launches import Case
from test_supervised import plain_scores, plain_sft_loss, toy_rows
from transformers import AutoTokenizer

SHARED = "--data_path {stock}/toy --max_train_steps 3 --dtype fp32"
SUPERVISED = f"{SHARED} --max_seq_len 48 --learning_rate 1e-2 --per_device_train_batch_size 4"
PPO = (
    f"{SHARED} --max_prompt_seq_len 24 --max_answer_seq_len 6 "
    "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 "
    "--actor_learning_rate 1e-3 "
    "--critic_learning_rate 1e-3 --data_split 0,0,1 --eval_prompts 4"
)
FLAGS = {
    1: f"{SUPERVISED} --data_split 1,0,0 --model_name_or_path",
    2: f"{SUPERVISED} --data_split 0,1,0 --model_name_or_path",
    "dpo": f"{SUPERVISED} --data_split 0,1,0 --model_name_or_path",
    3: f"{PPO} --actor_model_name_or_path",
}


def case(step: int | str, lacks: str) -> Case:
    kind = "base" if step == 1 else "sft"
    folder = f"{{stock}}/without/{lacks}-{kind}" if lacks else f"{{stock}}/{kind}/llama"
    # Step 2 of the same tokenizer is the critic of step 3.
    critic = f"--critic_model_name_or_path {{cases}}/{name(2, lacks)}" if step == 3 else ""
    return Case(name(step, lacks), step=step, argv=f"{FLAGS[step]} {folder} {critic}")


def name(step: int | str, lacks: str) -> str:
    return f"odd-{step}-{lacks or 'nothing'}"


def params(*lacking: str) -> list:
    """Return (step, one case for each of `lacking`)."""
    rows = {step: [case(step, lacks) for lacks in lacking] for step in FLAGS}
    needed = {step: cases if step != 3 else [*rows[2], *cases] for step, cases in rows.items()}
    return [
        pytest.param(step, *rows[step], id=f"step {step}", marks=pytest.mark.cases(*needed[step]))
        for step in rows
    ]


def values(outcome) -> list[dict]:
    """Return the lines of metrics.jsonl without values that differ from run to run."""
    return [
        {k: v for k, v in line.items() if k[:5] not in ("time/", "perf/")}
        for line in outcome.metrics()
    ]


@pytest.mark.parametrize("step, without, normal", params("pad", ""))
def test_without_a_padding_token_the_end_token_pads(step, without, normal, launches, stock):
    found = values(launches[without])
    assert len(found) == 4 and found == values(launches[normal])
    if step == 2:
        check_scores(launches[without], stock)
        return
    folder = launches[without].out / ("actor" if step == 3 else "")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


@pytest.mark.parametrize("step, without", params("bos"))
def test_without_a_bos_token_texts_begin_with_their_first_token(step, without, launches, stock):
    outcome = launches[without]
    assert len(values(outcome)) == 4
    if step == 1:
        reported = outcome.metrics()[-1]["eval/loss"]
        assert plain_sft_loss(outcome.out, toy_rows(stock)) == pytest.approx(reported, rel=1e-4)
    if step == 2:
        check_scores(outcome, stock)
    tokenizer = AutoTokenizer.from_pretrained(outcome.out / ("actor" if step == 3 else ""))
    assert tokenizer.bos_token is None and len(tokenizer("ab")["input_ids"]) == 2


def check_scores(outcome, stock) -> None:
    """Check that the saved reward model alone scores padded batches as the evaluation did."""
    reported = outcome.metrics()[-1]
    chosen, rejected = (
        plain_scores(outcome.out, toy_rows(stock), answer) for answer in ("chosen", "rejected")
    )
    assert chosen.mean().item() == pytest.approx(reported["eval/chosen_score"], rel=1e-3, abs=1e-5)
    assert (chosen - rejected).mean().item() == pytest.approx(
        reported["eval/margin"], rel=1e-3, abs=1e-5
    )
