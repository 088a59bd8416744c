"""Rows of like length in groups of a limited number of tokens."""

import random

import pytest

from dschat.algorithms.grouping import group_by_length, padded_tokens


def test_groups_are_filled_from_the_longest_row():
    # 2 x 10 tokens fit 20, then 3 x 6 (a fourth would make 24), and the rest.
    lengths = [6, 10, 1, 6, 9, 5, 2]
    assert group_by_length(lengths, tokens=20) == [[1, 4], [0, 3, 5], [6, 2]]


def test_a_row_over_the_limit_is_alone():
    assert group_by_length([9, 30, 8], tokens=18) == [[1], [0, 2]]


@pytest.mark.parametrize("least", [1, 5, 40])
def test_groups_hold_every_row_once_and_keep_the_limit(least):
    draw = random.Random(0)
    lengths = [draw.randint(1, 80) for _ in range(40)]
    groups = group_by_length(lengths, tokens=200, least=least)
    assert len(groups) >= least and all(groups)
    assert sorted(row for group in groups for row in group) == list(range(40))
    assert all(padded_tokens(group, lengths) <= 200 for group in groups)
