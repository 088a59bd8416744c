"""Steps 1 and 2 by their mains, over ZeRO stages, precisions, families and other options."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from options import AXES, STEPS, case_params, supervised_case
from outputs import check_model_folder, load_plainly
from transformers import AutoTokenizer

EVALUATED = {
    1: {"eval/loss", "eval/perplexity"},
    2: {"eval/accuracy", "eval/loss", "eval/chosen_score", "eval/rejected_score", "eval/margin"},
}
TRAINED = {
    "step",
    "train/loss",
    "train/real_tokens",
    "train/lr",
    "train/grad_norm",
    "time/step_s",
    "perf/tokens_per_s",
    "perf/mem_gib",
}


def params(step: int) -> list:
    # Step 1 has met every family with everything else.
    turns = ("family",) if step == 2 else ()
    return case_params(
        partial(supervised_case, step), AXES, turns=turns, minor=("family", "eot", "tensorboard")
    )


def check_outputs(outcome, step: int, options: dict, stock: Path) -> None:
    out = outcome.out
    start = stock / ("base" if step == 1 else "sft") / options["family"]
    check_model_folder(out, start=start, reward=step == 2, options=options)
    check_metrics(outcome.metrics(), step, options)
    run = json.loads((out / "run.json").read_text())
    assert (run["processes"], run["dtype"], run["total_steps"]) == (
        options["ranks"],
        options["dtype"],
        STEPS,
    )
    assert run["step"].startswith(f"Step {step}, ")
    events = {
        path.parent.relative_to(out / "events").parts[0]
        for path in (out / "events").rglob("events.out.*")
    }
    wanted = (
        {f"step{step}_tensorboard_logs", "ds_tensorboard_logs"} if options["tensorboard"] else set()
    )
    assert events == wanted


def check_metrics(lines: list[dict], step: int, options: dict) -> None:
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    trained = TRAINED | ({"train/accuracy"} if step == 2 else set())
    assert set(lines[0]) == {"step"} | EVALUATED[step]
    assert all(trained <= set(line) for line in lines[1:])
    assert set(lines[-1]) == trained | EVALUATED[step]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line["train/grad_norm"] > 0 for line in lines[1:])


def toy_rows(stock: Path) -> list[dict]:
    return [json.loads(line) for line in (stock / "toy" / "eval.jsonl").read_text().splitlines()]


def plain_sft_loss(folder: Path, rows: list[dict]) -> float:
    """Return nats per token of answers and end token, by transformers, one row at a time."""
    model = load_plainly(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nll = 0.0
    tokens = 0
    for row in rows:
        ids = tokenizer(row["prompt"] + row["chosen"])["input_ids"] + [tokenizer.eos_token_id]
        start = len(tokenizer(row["prompt"])["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        nll += torch.nn.functional.cross_entropy(
            logits, torch.tensor(ids[start:]), reduction="sum"
        ).item()
        tokens += len(ids) - start
    return nll / tokens


def plain_scores(folder: Path, rows: list[dict], answer: str) -> torch.Tensor:
    """Return [N]: the scores that AutoModelForSequenceClassification gives one padded batch."""
    model = load_plainly(folder, reward=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [row["prompt"] + row[answer] + tokenizer.eos_token for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        return model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.squeeze(-1)


@pytest.mark.parametrize("options, case", params(1))
def test_sft_leaves_a_complete_trained_model(options, case, launches, stock):
    outcome = launches[case]
    check_outputs(outcome, 1, options, stock)
    if options["dtype"] == "fp32":
        reported = outcome.metrics()[-1]["eval/loss"]
        assert plain_sft_loss(outcome.out, toy_rows(stock)) == pytest.approx(reported, rel=1e-4)


@pytest.mark.parametrize("options, case", params(2))
def test_reward_training_leaves_a_complete_trained_model(options, case, launches, stock):
    outcome = launches[case]
    check_outputs(outcome, 2, options, stock)
    if options["dtype"] == "fp32":
        rows = toy_rows(stock)
        reported = outcome.metrics()[-1]
        chosen, rejected = (
            plain_scores(outcome.out, rows, answer) for answer in ("chosen", "rejected")
        )
        assert (chosen - rejected).mean().item() == pytest.approx(
            reported["eval/margin"], rel=1e-3, abs=1e-5
        )
        assert chosen.mean().item() == pytest.approx(
            reported["eval/chosen_score"], rel=1e-3, abs=1e-5
        )
        assert (chosen > rejected).float().mean().item() == pytest.approx(reported["eval/accuracy"])
