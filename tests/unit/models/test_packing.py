"""Packed rows give the losses and gradients of padded ones, or are refused."""

import pytest
import torch
from transformers import MambaConfig

from dschat.data.collate import collate_pairs, collate_text
from dschat.data.packing import collate_packed, collate_packed_pairs
from dschat.models import forward
from dschat.models.causal_lm import load_causal_lm
from dschat.models.families import tiny_shape
from dschat.models.packing import check_packing, check_takes_positions
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from dschat.trainers.dpo import DPOObjective
from dschat.trainers.supervised import RewardObjective, SFTObjective
from tests.unit.models_helpers import FAMILIES, OPT_350M_LIKE, ModelAsEngine, random_texts, tiny

CASES = [(family, ()) for family in FAMILIES]
CASES += [("opt", OPT_350M_LIKE), ("mistral", (("sliding_window", 4),))]
ROWS = [[0, 1, 5], [2, 3, 4]]  # texts of each packed row; the second row is padded


def load(family, overrides=()):
    folder = tiny(family, std=0.1, overrides=overrides)
    return ModelAsEngine(load_causal_lm(folder, dtype=torch.float32, dropout=0.0))


def load_reward(family, overrides=()):
    folder = tiny(family, std=0.1, overrides=overrides)
    model = load_reward_model(
        folder, dtype=torch.float32, tokenizer=load_tokenizer(folder), dropout=0.0
    )
    return ModelAsEngine(model)


def loss_and_gradients(objective, engine, batch):
    engine.zero_grad()
    loss, logged = objective.loss_sum(engine, batch)
    loss = loss / objective.weight(batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in engine.named_parameters() if p.grad is not None}
    return loss.item(), {name: value.item() for name, value in logged.items()}, gradients


def check_equal(objective, engine, packed, padded):
    assert packed.input_ids.numel() < padded.input_ids.numel()
    loss, logged, gradients = loss_and_gradients(objective, engine, packed)
    expected_loss, expected_logged, expected = loss_and_gradients(objective, engine, padded)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert logged == pytest.approx(expected_logged, rel=1e-5, abs=1e-6)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name


def items():
    texts = [text.tolist() for text in random_texts((9, 5, 7, 1, 2, 6))]
    return [
        {"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]}
        for ids in texts
    ]


@pytest.mark.parametrize("family, overrides", CASES)
def test_loss_and_gradients_equal_the_padded_ones(family, overrides):
    padded = collate_text(items(), pad_id=1)
    packed = collate_packed([[items()[i] for i in row] for row in ROWS], pad_id=1)
    check_equal(SFTObjective(), load(family, overrides), packed, padded)


def pairs():
    """Return the padded pairs, and the same pairs packed: two in a row, and one in a padded row."""
    rows = [text.tolist() for text in random_texts((9, 4, 16, 5, 6, 12))]
    pairs = [
        {"chosen_ids": chosen, "rejected_ids": rejected, "num_prompt": 1, "margin": float(number)}
        for number, (chosen, rejected) in enumerate(zip(rows[::2], rows[1::2], strict=True))
    ]
    return collate_packed_pairs([pairs[:2], pairs[2:]], pad_id=1), collate_pairs(pairs, pad_id=1)


@pytest.mark.parametrize("family, overrides", CASES)
def test_a_reward_model_learns_from_packed_pairs_as_from_padded_ones(family, overrides):
    check_equal(RewardObjective(center_rewards_coef=0.1), load_reward(family, overrides), *pairs())


@pytest.mark.parametrize("family, overrides", CASES)
def test_dpo_learns_from_packed_pairs_as_from_padded_ones(family, overrides):
    reference = load(family, overrides)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    loss_type = "ipo" if family == "opt" else "sigmoid"  # ipo divides by the answers' lengths
    objective = DPOObjective(reference, beta=0.1, label_smoothing=0.0, loss_type=loss_type)
    check_equal(objective, load(family, overrides), *pairs())


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_keep_texts_apart_are_accepted(family):
    for engine in (load(family), load_reward(family)):
        check_takes_positions(engine.module.config, path=family)
        check_packing(engine, engine.module, path=family)


@pytest.mark.parametrize(
    "config", [tiny_shape("bloom", vocab=264).config(), MambaConfig()], ids=["bloom", "mamba"]
)
def test_families_without_positions_are_refused_by_name(config):
    message = f"--packing: {config.model_type} models, such as .* some/path.*--tokens_per_batch"
    with pytest.raises(ValueError, match=message):
        check_takes_positions(config, path="some/path")


def test_a_model_in_which_texts_see_each_other_is_refused(monkeypatch):
    monkeypatch.setattr(forward, "PACKED_BY_MASK", ())
    message = "--packing: in .* some/path a text sees the one before"
    for engine in (load("opt"), load_reward("opt")):
        with pytest.raises(ValueError, match=message):
            check_packing(engine, engine.module, path="some/path")
