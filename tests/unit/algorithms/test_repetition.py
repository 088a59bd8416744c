"""Repetition inside answers, against counts by hand and by sets."""

import torch

from dschat.algorithms.repetition import repeated_share


def test_the_share_of_repeated_ngrams_by_hand():
    tokens = torch.tensor(
        [
            [1, 2, 3, 4, 1, 2, 3, 4],  # 1234 2341 3412 4123 1234: one of five has been before
            [7, 7, 7, 7, 7, 7, 0, 0],  # 7777 three times: two of three
            [1, 2, 3, 0, 0, 0, 0, 0],  # shorter than an n-gram, and its padding repeats
            [1, 2, 3, 4, 5, 6, 7, 8],
        ]
    )
    mask = torch.ones_like(tokens).bool()
    mask[1, 6:] = False
    mask[2, 3:] = False
    assert torch.allclose(
        repeated_share(tokens, mask), torch.tensor([1 / 5, 2 / 3, 0, 0], dtype=torch.float64)
    )
    assert repeated_share(tokens[:, :3], mask[:, :3]).tolist() == [0, 0, 0, 0]


def test_random_answers_are_counted_as_with_sets():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4, (30, 24), generator=generator)
    tokens[::2] *= 30_000
    lengths = torch.randint(1, 25, (30,), generator=generator).tolist()
    mask = torch.tensor([[i < length for i in range(24)] for length in lengths])
    expected = []
    for row, length in zip(tokens.tolist(), lengths, strict=True):
        grams = [tuple(row[i : i + 2]) for i in range(length - 1)]
        expected.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    assert torch.allclose(
        repeated_share(tokens, mask, ngram=2), torch.tensor(expected, dtype=torch.float64)
    )
