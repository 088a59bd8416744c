"""Dynamic sampling: which groups are replaced, and how many batches that draws."""

import torch

from dschat.algorithms.advantages import equal_groups
from dschat.algorithms.types import PromptBatch
from dschat.runtime import dist
from dschat.trainers.dynamic_sampling import ExtraPrompts, join_answers, replace_equal_groups
from dschat.trainers.rollout import SampledAnswers

PAD = 0


def batch(prompts: list[list[int]], answers: list[list[int]], *, first: int) -> SampledAnswers:
    """Return two answers to each prompt; sampled logprobs are minus the tokens."""
    prompts = [prompt for prompt in prompts for _ in range(2)]
    width, longest = (max(map(len, rows)) for rows in (prompts, answers))
    left = torch.tensor([[PAD] * (width - len(row)) + row for row in prompts])
    right = torch.tensor([row + [PAD] * (longest - len(row)) for row in answers])
    index = torch.arange(len(prompts)) // 2 + first
    mask = right != PAD
    return SampledAnswers(
        prompts=PromptBatch(left, (left != PAD).long(), index),
        input_ids=torch.cat([left, right], -1),
        attention_mask=torch.cat([(left != PAD).long(), mask.long()], -1),
        response_mask=mask,
        ended=torch.tensor([len(row) > 1 for row in answers]),
        sampled_logprobs=-right.float(),
    )


def scored():
    """Return one batch of two groups: the first scores the same, the second does not."""
    answers = batch([[5], [6, 6]], [[11], [12, 12], [13], [14]], first=0)
    return answers, torch.tensor([1.0, 1.0, 0.0, 1.0])


def further(number: int):
    answers = batch([[7, 7, 7], [8]], [[21, 21, 21], [22], [23], [24]], first=10 * (number + 1))
    scores = [[2.0, 2.0, 3.0, 3.0], [4.0, 5.0, 6.0, 7.0]][number]
    return answers, torch.tensor(scores)


def run(max_extra: int, batches=None):
    drawn = []

    def more(number):
        drawn.append(number)
        return further(number)

    batches = [scored()] if batches is None else batches
    found, metrics = replace_equal_groups(
        batches, more, num_samples=2, max_extra=max_extra, pad_token_id=PAD
    )
    assert metrics == {"rollout/extra_rollouts": float(len(drawn))}
    return found, drawn


def test_equal_groups_by_hand():
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert equal_groups(scores, 2).tolist() == [True, False, True]
    assert equal_groups(scores, 3).tolist() == [False, False]


def test_an_equal_group_is_replaced_by_the_first_that_differs():
    ((answers, scores),), drawn = run(max_extra=4)
    assert drawn == [0, 1]
    assert scores.tolist() == [0.0, 1.0, 4.0, 5.0]
    assert answers.prompts.index.tolist() == [1, 1, 20, 20]
    assert answers.prompts.input_ids.tolist() == [[0, 6, 6]] * 2 + [[7, 7, 7]] * 2
    assert answers.tokens.tolist() == [[13, 0, 0], [14, 0, 0], [21, 21, 21], [22, 0, 0]]
    assert answers.response_mask.sum(-1).tolist() == [1, 1, 3, 1]
    assert answers.attention_mask.sum(-1).tolist() == [3, 3, 6, 4]
    assert answers.ended.tolist() == [False, False, True, False]
    assert torch.equal(answers.sampled_logprobs, -answers.tokens.float())


def test_groups_that_cannot_be_replaced_stay():
    ((answers, scores),), drawn = run(max_extra=1)
    assert drawn == [0]
    assert scores.tolist() == [0.0, 1.0, 1.0, 1.0]
    assert answers.prompts.index.tolist() == [1, 1, 0, 0]


def test_nothing_is_drawn_if_all_groups_differ():
    batches = [(further(1)[0], torch.tensor([1.0, 2.0, 3.0, 4.0]))]
    found, drawn = run(max_extra=4, batches=batches)
    assert found is batches and drawn == []


def test_a_rank_that_has_enough_draws_as_often_as_the_others(monkeypatch):
    # Another rank lacks 2 groups for the first two rounds.
    missing = iter([2, 2, 0])
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, kind="sum": torch.tensor(next(missing)))
    found, drawn = run(max_extra=4, batches=[(further(1)[0], torch.tensor([1.0, 2.0, 3.0, 4.0]))])
    assert drawn == [0, 1] and found[0][1].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_several_batches_keep_their_sizes():
    found, drawn = run(max_extra=4, batches=[scored(), scored()])
    assert drawn == [0, 1]
    assert [scores.tolist() for _, scores in found] == [[0.0, 1.0, 0.0, 1.0], [4.0, 5.0, 6.0, 7.0]]


def test_joined_rows_without_logprobs_of_the_generator():
    first = scored()[0]
    bare = SampledAnswers(**{**vars(first), "sampled_logprobs": None})
    joined = join_answers([bare, bare], pad_token_id=PAD)
    assert joined.sampled_logprobs is None and len(joined.ended) == 8


def test_extra_prompts_depend_on_seed_rollout_draw_and_rank(monkeypatch):
    rows = list(range(10))

    def of_rank(rank: int, rollout: int, number: int, seed: int = 1):
        monkeypatch.setattr(dist, "rank", lambda: rank)
        monkeypatch.setattr(dist, "world_size", lambda: 2)
        return ExtraPrompts(rows, list, size=5, seed=seed)(rollout, number)

    first = of_rank(0, 1, 0)
    assert first == of_rank(0, 1, 0)
    assert sorted(first + of_rank(1, 1, 0)) == rows
    assert len({tuple(of_rank(0, *case)) for case in ((1, 0), (1, 1), (2, 0), (2, 0, 5))}) == 4
