"""Packed rows: which texts share one, in which order they come, and what a batch of them holds."""

import numpy as np
import pytest

from dschat.data.loaders import real_share
from dschat.data.packing import collate_packed, collate_packed_pairs, pack_best_fit
from dschat.data.samplers import PackedSampler

LENGTHS = np.random.RandomState(0).randint(1, 40, 200)


def sampler(rank=0, **options):
    options = dict(world_size=2, batch_size=3, window=2, seed=7) | options
    return PackedSampler(LENGTHS, capacity=48, rank=rank, **options)


def rows_of(*samplers, epoch=0):
    for each in samplers:
        each.set_epoch(epoch)
    return [row for each in samplers for row in each]


def test_each_text_goes_to_the_fullest_row_with_room():
    # 9 and 8 open rows; 5 fits neither, 2 fits the second exactly, 1 the first.
    assert pack_best_fit([5, 1, 9, 2, 8], capacity=10) == [[2, 1], [4, 3], [0]]
    assert pack_best_fit([4, 4, 4], capacity=10) == [[0, 1], [2]]
    assert pack_best_fit([10], capacity=10) == [[0]]


def test_rows_hold_every_text_once_and_are_nearly_full():
    rows = pack_best_fit(LENGTHS, capacity=48)
    assert sorted(index for row in rows for index in row) == list(range(200))
    filled = [LENGTHS[row].sum() for row in rows]
    assert max(filled) <= 48
    assert sum(filled) / (48 * len(rows)) > 0.97


def test_ranks_share_an_epochs_rows_in_whole_windows():
    parts = [sampler(rank) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) and len(parts[0]) % (3 * 2) == 0
    for epoch in (0, 1):
        rows = rows_of(*parts, epoch=epoch)
        assert len(rows) == 2 * len(parts[0])
        unique = {tuple(row) for row in rows}
        assert sorted(index for row in unique for index in row) == list(range(200))
    first, second = (rows_of(parts[0], epoch=epoch) for epoch in (0, 1))
    assert first == rows_of(sampler(0)) != second
    assert {tuple(sorted(row)) for row in first} != {tuple(sorted(row)) for row in second}
    assert first != rows_of(sampler(0, seed=8))


def test_an_epoch_continues_in_its_middle():
    part = sampler(1)
    whole = rows_of(part, epoch=3)
    part.set_epoch(3, start=4)
    assert list(part) == whole[4:]


def test_a_blend_has_as_many_rows_in_each_epoch():
    part = sampler(0, draws=[(100, 130), (100, 30)])
    counts = [len(rows_of(part, epoch=epoch)) for epoch in range(4)]
    assert counts == [len(part)] * 4
    second_source = [
        index for row in rows_of(part, sampler(1, draws=part.item_draws)) for index in row
    ]
    assert 0 < sum(index >= 100 for index in second_source) < len(second_source) / 3


def test_a_batch_has_positions_from_zero_and_no_label_across_texts():
    texts = [dict(input_ids=[1, 2, 3], labels=[-100, 2, 3]), dict(input_ids=[4, 5], labels=[4, 5])]
    batch = collate_packed([texts, texts[:1]], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, 5], [-100, 2, 3, -100, -100]]


def test_a_batch_of_pairs_finds_each_text_again():
    one = dict(chosen_ids=[1, 2, 3], rejected_ids=[1, 4], num_prompt=1, margin=2.0)
    other = dict(chosen_ids=[5], rejected_ids=[5, 6, 7, 8], num_prompt=0)
    batch = collate_packed_pairs([[one, other], [one]], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 4, 5, 5, 6, 7, 8], [1, 2, 3, 1, 4] + [0] * 5]
    assert batch.labels[0].tolist() == [-100, 2, 3, -100, 4, -100, -100, 6, 7, 8]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 3]
    texts = [row[mask.bool()] for row, mask in zip(batch.by_text(batch.input_ids), batch.text_mask)]
    assert [text.tolist() for text in texts] == [
        *([1, 2, 3], [5], [1, 2, 3]),
        *([1, 4], [5, 6, 7, 8], [1, 4]),
    ]
    assert batch.margins.tolist() == [2, 0, 2, 2, 0, 2]


def test_the_share_of_real_tokens_counts_what_each_batch_is_padded_to():
    batches = [np.array([[4, 2], [1, 1]]), np.array([[3, 3]])]
    assert real_share(batches) == pytest.approx((8 + 6) / (16 + 6))
