"""Packed rows give the losses and gradients of padded ones, or are refused."""

import pytest
import torch
from transformers import MambaConfig

from dschat.data.collate import collate_text
from dschat.data.packing import collate_packed
from dschat.models import forward
from dschat.models.causal_lm import load_causal_lm
from dschat.models.families import tiny_shape
from dschat.models.packing import check_packing, check_takes_positions
from dschat.trainers.supervised import SFTObjective
from tests.unit.models_helpers import FAMILIES, OPT_350M_LIKE, ModelAsEngine, random_texts, tiny

CASES = [(family, ()) for family in FAMILIES]
CASES += [("opt", OPT_350M_LIKE), ("mistral", (("sliding_window", 4),))]
ROWS = [[0, 1, 5], [2, 3, 4]]  # texts of each packed row; the second row is padded


def load(family, overrides=()):
    folder = tiny(family, std=0.1, overrides=overrides)
    return ModelAsEngine(load_causal_lm(folder, dtype=torch.float32, dropout=0.0))


def loss_and_gradients(engine, batch):
    engine.zero_grad()
    objective = SFTObjective()
    loss, _ = objective.loss_sum(engine, batch)
    loss = loss / objective.weight(batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in engine.named_parameters()}


def items():
    texts = [text.tolist() for text in random_texts((9, 5, 7, 1, 2, 6))]
    return [
        {"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]}
        for ids in texts
    ]


@pytest.mark.parametrize("family, overrides", CASES)
def test_loss_and_gradients_equal_the_padded_ones(family, overrides):
    engine = load(family, overrides)
    padded = collate_text(items(), pad_id=1)
    packed = collate_packed([[items()[i] for i in row] for row in ROWS], pad_id=1)
    assert packed.input_ids.numel() < padded.input_ids.numel()
    loss, gradients = loss_and_gradients(engine, packed)
    expected_loss, expected = loss_and_gradients(engine, padded)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_keep_texts_apart_are_accepted(family):
    engine = load(family)
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
    engine = load("opt")
    monkeypatch.setattr(forward, "PACKED_BY_MASK", ())
    with pytest.raises(ValueError, match="--packing: in .* some/path a text sees the one before"):
        check_packing(engine, engine.module, path="some/path")
