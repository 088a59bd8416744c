import numpy as np
import pytest

from dschat.data.splits import (
    Assignment,
    Blend,
    first_indices_per_source,
    parse_shares,
    share_sizes,
)


def groups(*numbers):
    return np.array(numbers, dtype=np.uint64)


@pytest.mark.parametrize(
    "num_rows, data_split, sizes",
    [
        (10, "2,4,4", [2, 4, 4]),
        (7, "2,4,4", [1, 3, 3]),  # quotas 1.4, 2.8, 2.8
        (7, "0,1,1", [0, 4, 3]),  # DeepSpeed-Chat: 6, 0, 4, three rows in common
        (1001, "0,1,1", [0, 501, 500]),  # DeepSpeed-Chat: a row for the zero share
        (2, "1,1,1", [1, 1, 0]),
        (1, "0,0,1", [0, 0, 1]),
        (10, "0.2,0.4,0.4", [2, 4, 4]),
        (3, "0.1,0.1,0.1", [1, 1, 1]),  # in floating point 0.1 / (0.1 + 0.1 + 0.1) is below a third
        (0, "2,4,4", [0, 0, 0]),
    ],
)
def test_share_sizes_follow_the_largest_remainder_method(num_rows, data_split, sizes):
    assert share_sizes(num_rows, parse_shares(data_split)) == sizes
    labels = Assignment(5, 0).assign(np.arange(num_rows, dtype=np.uint64), parse_shares(data_split))
    assert [int((labels == step).sum()) for step in range(3)] == sizes


def test_assignment_depends_on_seed_and_salt_and_beginnings_alone():
    rows = np.arange(100, dtype=np.uint64)
    shares = parse_shares("2,4,4")
    first = Assignment(1234, 2).assign(rows, shares)
    assert (first == Assignment(1234, 2).assign(rows, shares)).all()
    assert (first != Assignment(1235, 2).assign(rows, shares)).any()
    assert (first != Assignment(1234, 1).assign(rows, shares)).any()
    order = np.random.default_rng(0).permutation(100)
    assert (first[order] == Assignment(1234, 2).assign(rows[order], shares)).all()
    # Pinned: other shares would mix the steps' rows in runs started with an earlier version.
    assert Assignment(1234, 2).assign(rows[:10], shares).tolist() == [1, 2, 1, 0, 1, 1, 2, 2, 2, 0]


@pytest.mark.parametrize("num_rows", [50, 99, 360, 1000])
def test_a_row_more_moves_at_most_one_beginning_at_each_border(num_rows):
    rows = np.random.default_rng(num_rows).integers(0, 2**63, num_rows + 1).astype(np.uint64)
    shares = parse_shares("2,4,4")
    before = Assignment(7, 0).assign(rows[:-1], shares)
    after = Assignment(7, 0).assign(rows, shares)
    assert (before != after[:-1]).sum() <= 2


def test_rows_with_one_beginning_stay_together_over_all_sources():
    steps = Assignment(3, 0)
    shares = parse_shares("1,1,1")
    rng = np.random.default_rng(1)
    first = rng.integers(0, 40, 300).astype(np.uint64)
    second = rng.integers(20, 60, 300).astype(np.uint64)
    labels = np.concatenate([steps.assign(rows, shares) for rows in (first, second)])
    rows = np.concatenate([first, second])
    for group in np.unique(rows):
        assert len(set(labels[rows == group])) == 1
    for part in (labels[:300], labels[300:]):
        counts = np.bincount(part, minlength=3)
        assert counts.min() > 60  # of 100, where a beginning has about 8 rows


def test_a_share_that_is_due_a_row_gets_a_beginning():
    labels = Assignment(0, 0).assign(groups(*[1] * 5, *[2] * 5), [9, 1])
    assert sorted(np.bincount(labels).tolist()) == [5, 5]
    assert set(Assignment(0, 0).assign(groups(1, 1, 1), [2, 1])) == {0}


def test_fixed_beginnings():
    held_out = Assignment(0, 0)
    held_out.fix(groups(4, 4, 2), label=1)
    assert held_out.assign(groups(4, 2, 2), [1, 0]).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "data_split",
    ["", "2", "2,4", "2,4,4,1", "0,0,0", "2,-1,4", "a,b,c", "nan,1,1", "inf,1,1", "1/0,1,1"],
)
def test_bad_split_names_the_flag_and_a_remedy(data_split):
    with pytest.raises(ValueError, match=r"--data_split .*such as 2,4,4"):
        parse_shares(data_split)


@pytest.mark.parametrize(
    "sizes, most, least, counts",
    [
        ([10], 4, 1, [4]),
        ([10], 20, 1, [10]),
        ([90, 10], 50, 1, [45, 5]),
        ([990, 10], 20, 1, [19, 1]),  # quotas 19.8 and 0.2
        ([990, 0, 5, 5], 3, 1, [1, 0, 1, 1]),
        ([990, 5, 5], 2, 1, [2, 0, 0]),  # too few for one of each
        ([900, 100], 20, 8, [12, 8]),
        ([900, 3], 20, 8, [17, 3]),
        ([900, 100], 20, 50, [10, 10]),  # no room for 50 of each
        ([], 5, 1, []),
    ],
)
def test_first_rows_of_each_source_are_in_proportion(sizes, most, least, counts):
    blend = Blend([(None, range(size)) for size in sizes])
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    expected = []
    for begin, count in zip(begins, counts):
        expected.extend(range(begin, begin + count))
    assert first_indices_per_source(blend, most, least=least) == expected
    assert first_indices_per_source(["row"] * 7, most) == list(range(min(7, most)))
