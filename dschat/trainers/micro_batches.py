"""Micro-batches of rows of like length, each as wide as its longest row."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from dschat.algorithms.grouping import group_by_length
from dschat.algorithms.types import PairBatch, TextBatch
from dschat.runtime import dist


def split_by_length(
    batch: TextBatch | PairBatch, *, tokens: int, device: torch.device
) -> list[TextBatch | PairBatch]:
    """Split the rows of an update into micro-batches of at most `tokens` tokens with padding.

    Every rank must call it with as many rows; all get as many micro-batches.

    Args:
        batch: all rows of this rank, padded on the right. The two texts of a pair stay together.
        tokens: most tokens of a micro-batch.
        device: for the exchange between ranks.

    Returns:
        Micro-batches that together hold each row once.
    """
    texts = 2 if isinstance(batch, PairBatch) else 1
    lengths = batch.attention_mask.sum(-1).view(texts, -1).amax(0)
    (groups,) = agreed_groups([lengths.tolist()], tokens=tokens // texts, device=device)
    found = []
    for group in groups:
        first = torch.tensor(group)
        rows = batch.rows(torch.cat([first + text * len(lengths) for text in range(texts)]))
        width = int(lengths[first].max())
        found.append(
            replace(
                rows,
                input_ids=rows.input_ids[:, :width],
                attention_mask=rows.attention_mask[:, :width],
                labels=rows.labels[:, :width],
            )
        )
    return found


def agreed_groups(
    batches: Sequence[Sequence[int]], *, tokens: int, device: torch.device
) -> list[list[list[int]]]:
    """Return ``group_by_length`` of each batch, with as many groups of it on every rank.

    Every rank must call it with as many batches. The ranks agree in one exchange.

    Args:
        batches: of each batch the tokens of its rows.
        tokens: most tokens of a group, with padding.
        device: for the exchange between ranks.
    """
    groups = [group_by_length(lengths, tokens=tokens) for lengths in batches]
    if not dist.has_peers():
        return groups
    own = torch.tensor([len(found) for found in groups], device=device)
    return [
        group_by_length(lengths, tokens=tokens, least=most)
        for lengths, most in zip(batches, dist.all_reduce(own, "max").tolist(), strict=True)
    ]
