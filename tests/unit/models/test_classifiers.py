"""Reward models of families for which transformers has no sequence classifier."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dschat.demo.tiny_models import byte_tokenizer
from dschat.memory.model_size import model_size
from dschat.models.reward_model import load_reward_model
from tests.tiny_families import COMMON, RARE, tiny_family_model
from tests.unit.models_helpers import pad, random_texts

# Its own classifier has another head.
REFUSED = ("modernbert-decoder",)
FAMILIES = [
    *COMMON,
    *(pytest.param(family, marks=pytest.mark.slow) for family in RARE if family not in REFUSED),
]


def _backbone(language_model):
    """Return the model without its head; Llama 4 does not name it as its base model."""
    base = language_model.base_model
    return language_model.model if base is language_model else base


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_a_reward_model_that_loads_again(family, tmp_path):
    tokenizer = byte_tokenizer()
    language_model = tiny_family_model(family)
    language_model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    made = load_reward_model(str(tmp_path / "base"), dtype=torch.float32, tokenizer=tokenizer)
    made.eval()
    head = made.model.score.weight.detach()
    assert 0.6 < head.std() * (head.shape[1] + 1) ** 0.5 < 1.4
    texts = random_texts()
    ids, mask = pad(texts, side="right", pad_id=tokenizer.pad_token_id)
    with torch.no_grad():
        values = made(ids, mask)
        backbone = _backbone(language_model)(input_ids=ids[:1, :5]).last_hidden_state
        assert torch.allclose(values[0, :5], (backbone @ head.T)[0, :, 0], atol=1e-4)
    assert model_size(language_model.config, reward=True).parameters == sum(
        p.numel() for p in made.parameters()
    )
    made.model.save_pretrained(tmp_path / "reward")
    again = load_reward_model(
        str(tmp_path / "reward"), dtype=torch.float32, tokenizer=tokenizer, fresh_head=False
    ).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    with torch.no_grad():
        assert torch.equal(again(ids, mask), values)
        scores = plain(input_ids=ids, attention_mask=mask).logits[:, 0]
    last = torch.tensor([len(text) - 1 for text in texts])
    assert torch.allclose(scores, values[torch.arange(len(texts)), last], atol=1e-4)
