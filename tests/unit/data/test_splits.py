import pytest

from dschat.data.splits import (
    Blend,
    first_indices_per_source,
    parse_shares,
    share_sizes,
    split_indices,
)


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
    steps = [split_indices(num_rows, data_split, step=step, data_seed=5) for step in (1, 2, 3)]
    assert [len(rows) for rows in steps] == sizes
    assert sorted(sum(steps, [])) == list(range(num_rows))


def test_split_depends_only_on_size_and_seed():
    first = split_indices(100, "2,4,4", step=3, data_seed=1234)
    assert first == split_indices(100, "2,4,4", step=3, data_seed=1234)
    assert first != split_indices(100, "2,4,4", step=3, data_seed=1235)
    assert first != sorted(first)
    # A dataset that shrank: no index of the larger one points past its end.
    assert max(split_indices(50, "2,4,4", step=3, data_seed=1234)) < 50
    # Pinned: another order would mix the steps' rows in runs started with an earlier version.
    assert split_indices(10, "2,4,4", step=1, data_seed=1234) == [6, 7]


@pytest.mark.parametrize(
    "data_split",
    ["", "2", "2,4", "2,4,4,1", "0,0,0", "2,-1,4", "a,b,c", "nan,1,1", "inf,1,1", "1/0,1,1"],
)
def test_bad_split_names_the_flag_and_a_remedy(data_split):
    with pytest.raises(ValueError, match=r"--data_split .*such as 2,4,4"):
        split_indices(10, data_split, step=1, data_seed=0)


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
