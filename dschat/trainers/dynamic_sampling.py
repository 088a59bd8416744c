"""Dynamic sampling: groups whose answers all score the same are replaced by other prompts' groups.

Yu et al. 2025 (DAPO), section 3.2. Such groups have no advantage, so an update without them learns
from more prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from dschat.algorithms.advantages import equal_groups
from dschat.algorithms.types import PromptBatch
from dschat.runtime import dist
from dschat.trainers.rollout import SampledAnswers

Scored = tuple[SampledAnswers, torch.Tensor]  # answers of a batch, and their scores [B]


class ExtraPrompts:
    """Prompts to replace others, drawn from the training rows.

    They depend on the seed, the rollout and the number of the draw alone, so that a resumed run
    draws the same.
    """

    def __init__(
        self, dataset, collate: Callable[[Sequence], PromptBatch], *, size: int, seed: int
    ):
        """Draw batches of `size` rows of `dataset` for each rank, made by `collate`."""
        self.dataset = dataset
        self.collate = collate
        self.size = size
        self.seed = seed

    def __call__(self, rollout: int, number: int) -> PromptBatch:
        """Return this rank's batch for draw `number` of `rollout`; no two ranks share a row."""
        draw = torch.Generator().manual_seed(self.seed + 1_000_003 * rollout + 7919 * number)
        order = torch.randperm(len(self.dataset), generator=draw).tolist()
        places = [dist.rank() + dist.world_size() * i for i in range(self.size)]
        return self.collate([self.dataset[order[place % len(order)]] for place in places])


def replace_equal_groups(
    scored: list[Scored],
    more: Callable[[int], Scored],
    *,
    num_samples: int,
    max_extra: int,
    pad_token_id: int,
) -> tuple[list[Scored], dict[str, float]]:
    """Replace groups of equal scores until none is left or `max_extra` batches have been drawn.

    Every rank draws as many batches as the rank that needs most, since generating may take
    collectives. Groups that cannot be replaced stay, so that every rank keeps its number of rows.

    Args:
        scored: batches of equal size.
        more: draws, answers and scores batch number n of further prompts.
        num_samples: answers in a group.
        max_extra: the most batches to draw.
        pad_token_id: fills rows up to the longest.

    Returns:
        As many batches of the same size, and the metric "rollout/extra_rollouts".
    """
    batch_groups = len(scored[0][1]) // num_samples
    wanted = batch_groups * len(scored)
    pieces = list(scored)
    extra = 0
    while extra < max_extra and _most_missing(pieces, wanted, num_samples) > 0:
        pieces.append(more(extra))
        extra += 1
    metrics = {"rollout/extra_rollouts": float(extra)}
    if extra == 0:
        return scored, metrics
    answers = join_answers([piece for piece, _ in pieces], pad_token_id=pad_token_id)
    scores = torch.cat([piece_scores for _, piece_scores in pieces])
    # A stable sort: groups that differ come first, in the order in which they were sampled.
    order = equal_groups(scores, num_samples).long().argsort(stable=True)[:wanted]
    offsets = torch.arange(num_samples, device=scores.device)
    rows = (order[:, None] * num_samples + offsets).view(len(scored), -1)
    return [(answers.rows(index), scores[index]) for index in rows], metrics


def join_answers(pieces: list[SampledAnswers], *, pad_token_id: int) -> SampledAnswers:
    """Concatenate the rows of batches, with prompts padded on the left and answers on the right."""
    num_prompt = max(piece.prompts.input_ids.shape[1] for piece in pieces)
    num_answer = max(piece.tokens.shape[1] for piece in pieces)
    columns: dict[str, list] = {}
    prompts: dict[str, list] = {}
    for piece in pieces:
        left = num_prompt - piece.prompts.input_ids.shape[1]
        right = num_answer - piece.tokens.shape[1]
        for name, fill in (("input_ids", pad_token_id), ("attention_mask", 0)):
            whole = F.pad(getattr(piece, name), (left, right), value=fill)
            columns.setdefault(name, []).append(whole)
            prompts.setdefault(name, []).append(whole[:, :num_prompt])
        prompts.setdefault("index", []).append(piece.prompts.index)
        columns.setdefault("response_mask", []).append(F.pad(piece.response_mask, (0, right)))
        columns.setdefault("ended", []).append(piece.ended)
        if piece.sampled_logprobs is not None:
            wide = F.pad(piece.sampled_logprobs, (0, right))
            columns.setdefault("sampled_logprobs", []).append(wide)
    joined = {name: torch.cat(tensors) for name, tensors in columns.items()}
    return replace(
        pieces[0],
        prompts=PromptBatch(**{name: torch.cat(tensors) for name, tensors in prompts.items()}),
        **joined,
    )


def _most_missing(pieces: list[Scored], wanted: int, num_samples: int) -> int:
    """Return how many groups the rank that lacks most still needs."""
    equal = [equal_groups(scores, num_samples) for _, scores in pieces]
    found = (~torch.cat(equal)).sum()
    return int(dist.all_reduce(wanted - found, "max"))
