"""Micro-batches of like length hold the rows of a batch, and the same losses."""

import pytest
import torch

from dschat.algorithms.types import PairBatch
from dschat.data.collate import collate_pairs, collate_text
from dschat.models.causal_lm import load_causal_lm
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from dschat.trainers.dpo import DPOObjective
from dschat.trainers.micro_batches import split_by_length
from dschat.trainers.supervised import RewardObjective, SFTObjective
from tests.unit.models_helpers import FAMILIES, ModelAsEngine, random_texts, tiny

CPU = torch.device("cpu")


def texts():
    rows = [text.tolist() for text in random_texts((9, 5, 17, 2, 12, 6))]
    return collate_text([{"input_ids": ids, "labels": ids} for ids in rows], pad_id=1)


def pairs():
    rows = [text.tolist() for text in random_texts((9, 5, 17, 4, 12, 6))]
    items = [
        {"chosen_ids": chosen, "rejected_ids": rejected, "num_prompt": 2, "margin": float(number)}
        for number, (chosen, rejected) in enumerate(zip(rows[::2], rows[1::2], strict=True))
    ]
    return collate_pairs(items, pad_id=1)


def summed(objective, engine, batches):
    """Return the loss over all batches, divided by its terms, and its gradients."""
    engine.zero_grad()
    weight = sum(objective.weight(batch) for batch in batches)
    total = 0.0
    for batch in batches:
        loss, _ = objective.loss_sum(engine, batch)
        (loss / weight).backward()
        total += (loss / weight).item()
    return total, {name: p.grad for name, p in engine.named_parameters() if p.grad is not None}


def check_equal(objective, engine, batch, *, tokens):
    split = split_by_length(batch, tokens=tokens, device=CPU)
    assert len(split) > 1
    assert all(micro.input_ids.numel() <= tokens for micro in split)
    assert all(micro.attention_mask[:, -1].any() for micro in split)
    loss, gradients = summed(objective, engine, split)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    expected_loss, expected = summed(objective, engine, [batch])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_does_not_depend_on_the_grouping(family):
    model = load_causal_lm(tiny(family, std=0.1), dtype=torch.float32, dropout=0.0)
    check_equal(SFTObjective(), ModelAsEngine(model), texts(), tokens=30)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_model_does_not_depend_on_the_grouping(family):
    folder = tiny(family, std=0.1)
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, dtype=torch.float32, tokenizer=tokenizer, dropout=0.0)
    check_equal(RewardObjective(), ModelAsEngine(model), pairs(), tokens=44)


@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_does_not_depend_on_the_grouping(family):
    load = dict(dtype=torch.float32, dropout=0.0)
    engine, reference = (
        ModelAsEngine(load_causal_lm(tiny(name, std=0.1), **load)) for name in (family, family)
    )
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    objective = DPOObjective(reference, beta=0.1, label_smoothing=0.1)
    check_equal(objective, engine, pairs(), tokens=44)


def test_pairs_stay_together():
    batch = pairs()
    for micro in split_by_length(batch, tokens=44, device=CPU):
        assert isinstance(micro, PairBatch)
        half = len(micro.margins) // 2
        assert micro.margins[:half].equal(micro.margins[half:])
        assert micro.input_ids[:half, :2].tolist() == [
            batch.input_ids[int(margin), :2].tolist() for margin in micro.margins[:half]
        ]
        assert micro.input_ids[half:, :2].tolist() == [
            batch.input_ids[3 + int(margin), :2].tolist() for margin in micro.margins[half:]
        ]
