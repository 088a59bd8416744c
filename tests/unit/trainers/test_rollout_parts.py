"""Scoring in parts of like length gives what scoring all answers at once does."""

import pytest
import torch

from dschat.algorithms.types import PromptBatch
from dschat.models.causal_lm import load_causal_lm
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from dschat.trainers.answers import answer_logprobs, answer_values
from dschat.trainers.rewards import ModelReward
from dschat.trainers.rollout import (
    SampledAnswers,
    join_parts,
    parts_by_length,
)
from tests.unit.models_helpers import FAMILIES, ModelAsEngine, pad, random_texts, tiny

TOKENS = 48


def sampled() -> SampledAnswers:
    prompts, prompt_mask = pad(random_texts((9, 3, 12, 5, 2)), side="left", pad_id=1)
    answers, answer_mask = pad(random_texts((4, 15, 1, 7, 10), seed=5), side="right", pad_id=1)
    # One more column than the longest answer, as a generator may leave.
    answers, answer_mask = (torch.nn.functional.pad(t, (0, 1)) for t in (answers, answer_mask))
    return SampledAnswers(
        prompts=PromptBatch(prompts, prompt_mask, torch.arange(5)),
        input_ids=torch.cat([prompts, answers], -1),
        attention_mask=torch.cat([prompt_mask, answer_mask], -1),
        response_mask=answer_mask.bool(),
        ended=torch.tensor([True, False, True, True, False]),
    )


def test_parts_hold_every_answer_once_without_padded_columns():
    answers = sampled()
    parts = parts_by_length(answers, tokens=TOKENS)
    assert len(parts) > 1
    assert sorted(torch.cat([rows for rows, _ in parts]).tolist()) == list(range(5))
    for rows, part in parts:
        assert part.input_ids.numel() <= TOKENS
        assert part.attention_mask[:, 0].all() and part.attention_mask[:, -1].any()
        for row, ids, mask in zip(rows, part.input_ids, part.attention_mask, strict=True):
            kept = answers.attention_mask[row].bool()
            assert ids[mask.bool()].equal(answers.input_ids[row][kept])
    ((_, whole),) = parts_by_length(answers, tokens=0)
    assert whole is answers


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_does_not_depend_on_the_parts(family):
    answers = sampled()
    parts = parts_by_length(answers, tokens=TOKENS)
    mask = answers.response_mask
    folder = tiny(family, std=0.1)
    load = dict(dtype=torch.float32, dropout=0.0)
    actor = ModelAsEngine(load_causal_lm(folder, **load)).eval()
    critic = ModelAsEngine(
        load_reward_model(folder, tokenizer=load_tokenizer(folder), **load)
    ).eval()
    torch.nn.init.normal_(critic.module.model.score.weight)
    with torch.no_grad():
        for forward in (
            lambda part: answer_logprobs(actor, part, temperature=0.7)[0],
            lambda part: answer_values(critic, part),
        ):
            expected = forward(answers)
            found = join_parts(answers, parts, forward)
            assert found.shape == expected.shape
            assert expected[mask].abs().max() > 0.1
            torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
        scores = ModelReward(critic, "m", tokens_per_batch=TOKENS)(answers, None).values
        expected = ModelReward(critic, "m")(answers, None).values
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
