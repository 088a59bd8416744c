"""Greedy answers of transformers' families against each model's own generate."""

import pytest
import torch

from dschat.engine.hybrid_engine import HybridEngine
from dschat.generation.decoding import padding_caveats
from dschat.models.families import READS_LEFT_PADDING
from dschat.models.forward import forward_logits
from tests.tiny_families import COMMON, RARE, tiny_config, tiny_family_model
from tests.unit.generation.test_decoding import config, prompts, stand_in

FAMILIES = [*COMMON, *(pytest.param(family, marks=pytest.mark.slow) for family in RARE)]
ANSWER = 12


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_models_own(family):
    # Tied, Gemma's large embeddings repeat the last token.
    untied = dict(tie_word_embeddings=False) if family.startswith("gemma") else {}
    model = tiny_family_model(family, std=0.5, **untied)
    lengths = (9, 9) if family in READS_LEFT_PADDING else (3, 11, 7)
    ids, mask = prompts(*lengths, width=14)  # padding in all rows too
    settings = config(max_new_tokens=ANSWER, eos_token_id=[])
    found = HybridEngine(stand_in(model)).decode(ids, mask, settings).tokens
    with torch.no_grad():
        for row, tokens in enumerate(found):
            alone = ids[row : row + 1, mask[row].bool()]
            own = model.generate(
                alone,
                attention_mask=torch.ones_like(alone),
                max_new_tokens=ANSWER,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert torch.equal(tokens, own[0, alone.shape[1] :])
    assert len(set(found.flatten().tolist())) >= 4, "answers that vary show more"


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_only_the_families_that_are_listed(family):
    model = tiny_family_model(family, std=0.3)
    ids = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    with torch.no_grad():
        whole = forward_logits(model, model, input_ids=ids, attention_mask=torch.ones_like(ids))
        found = forward_logits(model, model, input_ids=padded, attention_mask=mask)[:, 4:]
    is_same = (found - whole).abs().max() <= 1e-3 * whole.std()
    assert is_same == (family not in READS_LEFT_PADDING)
    assert bool(padding_caveats(model)) == (family in READS_LEFT_PADDING)


def test_caveats_name_the_cause_and_the_remedy():
    (padding,) = padding_caveats(tiny_family_model("recurrent_gemma"))
    assert "padding on the left" in padding and "batch size of 1" in padding
    rope = dict(tiny_config("llama").rope_parameters, rope_type="dynamic", factor=2.0)
    (length,) = padding_caveats(tiny_family_model("llama", rope_parameters=rope))
    assert "longest text" in length and "--max_prompt_seq_len" in length
