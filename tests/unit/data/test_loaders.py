import logging
from functools import partial

import pytest

from dschat.config.sft import SFTData
from dschat.data.blends import epoch_draws
from dschat.data.collate import collate_prompts, collate_text
from dschat.data.loaders import (
    ShardedSampler,
    build_pair_data,
    build_prompt_data,
    build_sft_data,
    first_rows,
    make_loader,
    make_loaders,
)
from tests.unit.data_helpers import (
    EOS,
    PAD,
    ids_of,
    make_tokenizer,
    pairs,
    write_lines,
)


def order(num_rows, *, epoch=0, **options):
    """Return the rows of all ranks in the global order."""
    world_size = options["world_size"]
    samplers = [ShardedSampler(num_rows, rank=rank, **options) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    shards = [list(sampler) for sampler in samplers]
    assert {len(shard) for shard in shards} == {len(samplers[0])}
    return [shards[i % world_size][i // world_size] for i in range(world_size * len(shards[0]))]


@pytest.mark.parametrize(
    "num_rows, world_size, batch_size, window, total",
    [(12, 2, 3, 2, 12), (13, 2, 3, 2, 24), (10, 3, 2, 1, 12), (1, 1, 1, 1, 1), (5, 2, 4, 2, 16)],
)
def test_sampler_covers_every_row_in_whole_windows(num_rows, world_size, batch_size, window, total):
    options = dict(world_size=world_size, batch_size=batch_size, window=window, seed=7)
    plain = order(num_rows, shuffle=False, **options)
    assert plain == [i % num_rows for i in range(total)]
    shuffled = order(num_rows, shuffle=True, **options)
    # Disjoint over the ranks, and complete.
    assert sorted(shuffled[:num_rows]) == list(range(num_rows))
    assert shuffled == (shuffled[:num_rows] * total)[:total]


def test_sampler_order_depends_on_seed_and_epoch():
    options = dict(world_size=2, batch_size=1, shuffle=True)
    first = order(20, seed=7, **options)
    assert first == order(20, seed=7, **options)
    assert first != sorted(first)
    orders = set()
    for seed in (7, 8):
        for epoch in (0, 1):
            orders.add(tuple(order(20, seed=seed, epoch=epoch, **options)))
    assert len(orders) == 4


def test_sampler_counts_rows_before_the_padding():
    def num_unique(num_rows, rank):
        return ShardedSampler(
            num_rows, rank=rank, world_size=4, batch_size=2, shuffle=False, seed=0
        ).num_unique

    assert [num_unique(10, rank) for rank in range(4)] == [3, 3, 2, 2]
    assert [num_unique(2, rank) for rank in range(4)] == [1, 1, 0, 0]
    assert [num_unique(8, rank) for rank in range(4)] == [2, 2, 2, 2]


def test_sampler_warns_about_repeated_rows(caplog):
    ShardedSampler(5, rank=0, world_size=2, batch_size=4, window=2, shuffle=True, seed=0)
    assert "5 rows are fewer than the 16 of one update" in caplog.text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSCHAT_CACHE", str(tmp_path / "cache"))


def data_options(*paths, **options):
    options = {"max_seq_len": 50, **options}
    return SFTData(data_path=[str(path) for path in paths], **options)


def folder(tmp_path, name="set", num_train=20, num_eval=10, begin=0):
    write_lines(tmp_path / name / "train.jsonl", pairs(num_train, begin))
    write_lines(tmp_path / name / "eval.jsonl", pairs(num_eval, begin + num_train))
    return tmp_path / name


def build(step, data):
    tokenizer = make_tokenizer()
    if step == 1:
        return build_sft_data(data, tokenizer, end_token_id=EOS)
    if step == 2:
        return build_pair_data(data, tokenizer, cut_fraction=1.0, seed=1, end_token_id=EOS)
    return build_prompt_data(data, tokenizer, max_prompt_len=50)


def prompts(dataset):
    return [dataset.row(i).prompt for i in range(len(dataset))]


def test_steps_share_no_row_of_either_part(tmp_path):
    data = data_options(folder(tmp_path), folder(tmp_path, "other", 5, 5, begin=100))
    built = [build(step, data) for step in (1, 2, 3)]
    assert [(len(train), len(held_out)) for train, held_out in built] == [(5, 3), (10, 6), (10, 6)]
    for part, num_rows in ((0, 25), (1, 15)):
        found = [prompt for parts in built for prompt in prompts(parts[part])]
        assert len(set(found)) == len(found) == num_rows
    assert prompts(build(3, data)[0]) == prompts(built[2][0])


def test_sft_only_sets_are_whole(tmp_path):
    other = str(folder(tmp_path, "other", 5, 4, begin=100))
    data = data_options(folder(tmp_path), data_split="0,1,1", sft_only_data_path=[other])
    train, held_out = build(1, data)
    assert prompts(train) == [f"p{i}" for i in range(100, 105)]
    assert prompts(held_out) == [f"p{i}" for i in range(105, 109)]
    with pytest.raises(ValueError, match=r"--data_split 0,1,1 leaves step 1 no train row"):
        build(1, data_options(folder(tmp_path), data_split="0,1,1"))


def test_empty_evaluation_share_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"--data_split 2,4,4 leaves step 1 no eval row of --data_path .*set"
    ):
        build(1, data_options(folder(tmp_path, num_eval=1)))


def test_malformed_split_fails_before_data_is_read():
    with pytest.raises(ValueError, match="--data_split 1"):
        build(1, data_options("/no/such/file.jsonl", data_split="1"))


def test_only_training_pairs_are_cut(tmp_path):
    train, held_out = build(2, data_options(folder(tmp_path)))
    assert all(train[i]["chosen_ids"][-1] != EOS for i in range(len(train)))
    assert all(held_out[i]["chosen_ids"][-1] == EOS for i in range(len(held_out)))


def test_rows_without_the_answer_that_a_step_needs(tmp_path, caplog):
    rows = [*pairs(10), *({"prompt": f"q{i}", "chosen": " c"} for i in range(10))]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    data = data_options(path, data_split="0,1,0")
    with pytest.raises(
        ValueError, match=r'line 1\d: no "rejected", which step 2 needs; \d+ of the 18 rows'
    ):
        build(2, data)
    data = data_options(path, data_split="0,1,0", skip_bad_rows=True, eval_fraction=0.5)
    with caplog.at_level(logging.WARNING):
        train, held_out = build(2, data)
    assert sorted(prompts(train) + prompts(held_out)) == sorted(f"p{i}" for i in range(10))
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": f"q{i}"} for i in range(30)])
    with pytest.raises(ValueError, match='no "chosen", which step 1 needs'):
        build(1, data_options(path))
    path = write_lines(tmp_path / "e.jsonl", [{"prompt": "", "chosen": f"x{i}"} for i in range(30)])
    with pytest.raises(ValueError, match='no "prompt", which step 3 needs'):
        build(3, data_options(path))


def test_building_reports_cut_rows(tmp_path, caplog):
    data = data_options(folder(tmp_path), data_split="0,0,1")
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(ValueError, match="no row of the evaluation data is left"),
    ):
        build_prompt_data(data, make_tokenizer(), max_prompt_len=2)
    # p0 to p9 have two tokens, p10 to p29 three.
    assert (
        "training data: 10 of 20 rows; 0 are longer than --max_prompt_seq_len 2 and are cut "
        "(longest: 3 tokens); 10 (50.0%) left out: its prompt is longer than --max_prompt_seq_len 2"
        in caplog.text
    )


def test_evaluation_takes_the_first_rows_of_every_source_in_proportion(tmp_path, caplog):
    data = data_options(
        folder(tmp_path, num_eval=30),
        folder(tmp_path, "other", 20, 10, begin=100),
        data_split="0,0,1",
    )
    held_out = build(3, data)[1]
    everything = prompts(held_out)
    with caplog.at_level(logging.INFO):
        assert prompts(first_rows(held_out, 40)) == everything
        assert "evaluating" not in caplog.text
        assert prompts(first_rows(held_out, 8)) == [*everything[:6], *everything[30:32]]
    assert (
        "evaluating on 8 of 40 held-out rows, the first of each source in proportion" in caplog.text
    )
    assert held_out[7]["input_ids"] == ids_of(everything[31])
    alone = build(3, data_options(folder(tmp_path, num_eval=30), data_split="0,0,1"))[1]
    with caplog.at_level(logging.INFO):
        assert prompts(first_rows(alone, 8)) == everything[:8]
    assert "evaluating on the first 8 of 30 held-out rows" in caplog.text


@pytest.mark.parametrize(("eval_iters", "expected"), [(2, 6), (None, 30)])
def test_evaluation_takes_a_number_of_batches(tmp_path, eval_iters, expected):
    parts = build(1, data_options(folder(tmp_path, num_eval=30), data_split="1,0,0"))
    _, evaluated = make_loaders(
        *parts,
        collate_text,
        pad_id=PAD,
        train_batch_size=2,
        eval_batch_size=3,
        window=1,
        seed=0,
        eval_iters=eval_iters,
    )
    assert len(evaluated.dataset) == expected


def test_building_fails_if_rows_do_not_fit_the_format(tmp_path):
    with pytest.raises(ValueError, match="--prompt_format chat"):
        build(3, data_options(folder(tmp_path), prompt_format="chat"))


@pytest.mark.parametrize("part", ["train", "eval"])
def test_building_fails_if_a_later_source_does_not_fit_the_format(tmp_path, part):
    texts = folder(tmp_path, num_train=1500, num_eval=1500)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name in ("train", "eval"):
        rows = [{"messages": messages}] * 3 if name == part else pairs(3)
        write_lines(tmp_path / "late" / f"{name}.jsonl", rows)
    data = data_options(texts, tmp_path / "late", data_split="0,0,1", prompt_format="plain")
    with pytest.raises(
        ValueError, match=rf"{part}.jsonl, line \d: --prompt_format plain cannot show messages"
    ):
        build(3, data)


def test_loader_gives_each_rank_its_batches(tmp_path):
    train, _ = build(3, data_options(folder(tmp_path), data_split="0,0,1"))
    seen = []
    for rank in range(2):
        loader = make_loader(
            train,
            partial(collate_prompts, pad_id=PAD),
            batch_size=3,
            rank=rank,
            world_size=2,
            shuffle=True,
            seed=1,
        )
        loader.sampler.set_epoch(2)
        batches = list(loader)
        assert len(batches) == len(loader) == 4
        assert all(batch.input_ids.shape[0] == 3 for batch in batches)
        row = int(batches[0].index[0])
        expected = ids_of(train.prompt_text(row))
        assert batches[0].input_ids[0].tolist()[-len(expected) :] == expected
        seen += [int(i) for batch in batches for i in batch.index]
    assert set(seen) == set(range(20))
    assert len(seen) == 24


def test_a_weighted_blend_draws_whole_passes_and_then_rows_at_random():
    draws = [(10, 25), (20, 5)]
    options = dict(rank=0, world_size=1, batch_size=1, shuffle=True, seed=3, draws=draws)
    sampler = ShardedSampler(30, **options)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        counts = [rows.count(row) for row in range(30)]
        assert len(rows) == len(sampler) == 30
        assert sorted(counts[:10]) == [2] * 5 + [3] * 5
        assert sorted(counts[10:]) == [0] * 15 + [1] * 5
        orders.append(rows)
    assert set(orders[0]) != set(orders[1])
    sampler.set_epoch(1, start=7)
    assert list(sampler) == orders[1][7:]


@pytest.mark.parametrize(
    "weights, temperature, counts",
    [
        ([], 1.0, None),
        ([1, 1], 1.0, [50, 50]),
        ([3, 1], 1.0, [75, 25]),
        ([0, 1], 1.0, [0, 100]),
        ([], 2.0, [75, 25]),  # square roots of 90 and 10: 9.49 and 3.16
    ],
)
def test_shares_of_an_epoch(weights, temperature, counts):
    draws = epoch_draws(["a", "b"], [90, 10], weights=weights, temperature=temperature)
    assert draws == (counts and list(zip([90, 10], counts, strict=True)))


def test_a_blend_is_drawn_by_its_flag(tmp_path, caplog):
    paths = [folder(tmp_path), folder(tmp_path, "other", 5, 5, begin=100)]
    with caplog.at_level(logging.INFO):
        train, _ = build(3, data_options(*paths, data_split="0,0,1", blend=[1.0, 4.0]))
    assert train.draws == [(20, 5), (5, 20)]
    assert "20 rows of an epoch, 4.00 passes over its 5" in caplog.text
    with pytest.raises(ValueError, match="--blend has 1 weights, and there are 2 data sets"):
        build(3, data_options(*paths, data_split="0,0,1", blend=[1.0]))


def test_step_3_needs_two_held_out_prompts(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", pairs(9))
    with pytest.raises(ValueError, match="spread of scores over the held-out prompts"):
        build(3, data_options(path, data_split="0,0,1"))
    assert len(build(3, data_options(path, data_split="0,0,1", eval_fraction=0.3))[1]) == 3


def test_a_base_model_trained_on_messages_gets_a_chat_template(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(20)
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    tokenizer = make_tokenizer()
    data = data_options(path, data_split="1,0,0")
    train, _ = build_sft_data(data, tokenizer, end_token_id=EOS)
    assert train.text_format == "human_assistant"
    before = [train[i] for i in range(len(train))]
    assert tokenizer.chat_template
    # A later step with the saved tokenizer reads the same tokens, by the template.
    again, _ = build_sft_data(data, tokenizer, end_token_id=EOS)
    assert again.text_format == "chat"
    assert [again[i] for i in range(len(again))] == before
