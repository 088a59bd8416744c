import pytest

from dschat.config.sft import SFTData
from dschat.data import parallel
from dschat.data.blends import open_blends
from dschat.data.collate import collate_pairs, collate_prompts, collate_text
from dschat.data.datasets import LeftOut, PairDataset, PromptDataset, SFTDataset
from dschat.data.encoding import leading_ids
from dschat.data.preparation import prepare
from dschat.data.row import Row
from tests.unit.data_helpers import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    PAD,
    ids_of,
    make_tokenizer,
    pairs,
    write_lines,
)

SPACE_A = 259  # the one token of two bytes, " a"


def sft(
    row,
    *,
    bos=False,
    max_seq_len=100,
    prompt_format="plain",
    truncation="keep_prompt",
    train_on="all_assistant",
    **options,
):
    return SFTDataset(
        [row],
        make_tokenizer(bos=bos, **options),
        max_seq_len=max_seq_len,
        prompt_format=prompt_format,
        truncation=truncation,
        train_on=train_on,
    )[0]


def pair_data(rows, *, bos=False, max_seq_len=100, **options):
    tokenizer = make_tokenizer(bos=bos)
    options = {"prompt_format": "plain", **options}
    return PairDataset(rows, tokenizer, max_seq_len=max_seq_len, **options)


def prompt_data(rows, *, bos=False, max_prompt_len=100, truncation="keep_prompt"):
    return PromptDataset(
        rows,
        make_tokenizer(bos=bos),
        max_prompt_len=max_prompt_len,
        prompt_format="plain",
        truncation=truncation,
    )


def test_leading_ids_are_only_those_before_the_text():
    assert leading_ids(make_tokenizer()) == []
    assert leading_ids(make_tokenizer(bos=True)) == [BOS]
    assert leading_ids(make_tokenizer(eos=True)) == []
    assert leading_ids(make_tokenizer(bos=True, eos=True)) == [BOS]


@pytest.mark.parametrize("bos, lead", [(False, []), (True, [BOS])])
def test_sft_item(bos, lead):
    item = sft(Row("xy", "zw"), bos=bos, eos=bos)
    assert item["input_ids"] == [*lead, *ids_of("xyzw"), EOS]
    assert item["labels"] == [-100] * (len(lead) + 2) + [*ids_of("zw"), EOS]


def test_end_token_is_not_repeated():
    assert sft(Row("x", "z</s>"))["input_ids"] == [*ids_of("xz"), EOS]


def test_bos_of_a_chat_template_is_not_repeated():
    item = sft(
        Row("x", "z"),
        bos=True,
        prompt_format="chat",
        chat_template=CHAT_TEMPLATE.replace("</>", "</s>"),
    )
    assert item["input_ids"] == [BOS, *ids_of("<user>x"), EOS, *ids_of("<assistant>z"), EOS]


def test_prompt_and_answer_are_tokenized_jointly():
    assert sft(Row("x", " az"))["labels"] == [-100, SPACE_A, *ids_of("z"), EOS]


def test_token_across_the_border_is_split_so_that_the_prompt_keeps_its_ids():
    row = Row("x ", "a")
    item = sft(row)
    assert item["input_ids"] == [*ids_of("x a"), EOS]  # not " a" as one token
    assert item["labels"] == [-100, -100, *ids_of("a"), EOS]
    assert prompt_data([row])[0]["input_ids"] == ids_of("x ")


@pytest.mark.parametrize(
    "truncation, bos, max_seq_len, text, num_learned",
    [
        ("keep_prompt", False, 6, "uvwxy.", 3),  # all of it; "." stands for </s>
        ("keep_prompt", False, 5, "uvwxy", 2),  # the end token is cut
        ("keep_prompt", False, 4, "uvwx", 1),
        ("keep_prompt", False, 3, None, 0),
        ("keep_prompt", True, 5, "^uvwx", 1),
        ("keep_prompt", True, 4, None, 0),
        ("share", False, 5, "vwxy.", 3),
        ("share", False, 4, "vwxy", 2),
        ("share", False, 2, "wx", 1),
        ("share", True, 5, "^wxy.", 3),  # BOS stays
        ("share", True, 4, "^wxy", 2),
        ("share", True, 2, "^x", 1),
        ("share", True, 1, None, 0),
        ("drop", False, 6, "uvwxy.", 3),
        ("drop", False, 5, None, 0),
    ],
)
def test_truncation(truncation, bos, max_seq_len, text, num_learned):
    row = Row("uvw", "xy")
    options = dict(bos=bos, max_seq_len=max_seq_len, truncation=truncation)
    if text is None:
        with pytest.raises(LeftOut, match=f"--max_seq_len {max_seq_len}"):
            sft(row, **options)
        return
    item = sft(row, **options)
    expected = [{"^": BOS, ".": EOS}.get(letter) or ids_of(letter)[0] for letter in text]
    assert item["input_ids"] == expected
    assert len(expected) == max_seq_len
    begin = max_seq_len - num_learned
    assert item["labels"] == [-100] * begin + expected[begin:]
    whole = sft(row, train_on="all", **options)
    assert whole["labels"] == whole["input_ids"] == expected


def test_pair_item():
    data = pair_data([Row("p", "good", "no"), Row("p", "good", "no", margin=1.5)], bos=True)
    expected = {
        "chosen_ids": [BOS, *ids_of("pgood"), EOS],
        "rejected_ids": [BOS, *ids_of("pno"), EOS],
        "num_prompt": 2,
    }
    assert data[0] == {**expected, "margin": 0.0}
    assert data[1] == {**expected, "margin": 1.5}


def test_pairs_share_one_prompt_when_an_answer_is_too_long():
    row = Row("uvw", "good", "no")

    def ids(**options):
        item = pair_data([row], bos=True, **options)[0]
        return item["chosen_ids"], item["rejected_ids"], item["num_prompt"]

    prompt = [BOS, *ids_of("uvw")]
    assert ids(max_seq_len=7) == ([*prompt, *ids_of("goo")], [*prompt, *ids_of("no"), EOS], 4)
    assert ids(max_seq_len=7, truncation="share") == (
        [BOS, *ids_of("vwgood")],
        [BOS, *ids_of("vwno"), EOS],
        3,
    )
    with pytest.raises(LeftOut, match="longer than --max_seq_len 7"):
        ids(max_seq_len=7, truncation="drop")
    with pytest.raises(LeftOut, match="has no room"):
        ids(max_seq_len=4)


def test_pairs_that_are_equal_once_cut_are_left_out():
    with pytest.raises(LeftOut, match="equal once they are cut"):
        pair_data([Row("p", "samex", "samey")], max_seq_len=5)[0]


def test_cut_pairs_have_equal_length_and_no_end():
    rows = [Row("p", f"{'xyz'[i % 3]}bcdefg", "hijkl") for i in range(400)]
    data = pair_data(rows, cut_fraction=0.5, seed=3)
    items = [data[i] for i in range(len(rows))]
    cut = [item for item in items if item["chosen_ids"][-1] != EOS]
    assert 160 < len(cut) < 240
    lengths = {len(item["chosen_ids"]) - 1 for item in cut}
    assert lengths == {2, 3, 4, 5}
    for item in cut:
        assert len(item["chosen_ids"]) == len(item["rejected_ids"])
        assert EOS not in item["rejected_ids"]
    assert all(item["rejected_ids"][-1] == EOS for item in items if item not in cut)
    again = pair_data(rows, cut_fraction=0.5, seed=3)
    assert items == [again[i] for i in range(len(rows))]
    assert items != [pair_data(rows, cut_fraction=0.5, seed=4)[i] for i in range(len(rows))]
    assert all(pair_data(rows)[i]["chosen_ids"][-1] == EOS for i in range(20))


def test_cut_answers_still_differ():
    data = pair_data(
        [Row("p", "samex", "samey"), Row("p", "same", "samex"), Row("p", "x", "y")],
        cut_fraction=1.0,
    )
    assert data[0] == {
        "chosen_ids": ids_of("psamex"),
        "rejected_ids": ids_of("psamey"),
        "num_prompt": 1,
        "margin": 0.0,
    }
    # One answer begins with the other: cutting would make them equal.
    assert data[1]["chosen_ids"] == [*ids_of("psame"), EOS]
    # Shorter than the shortest cut.
    assert data[2]["chosen_ids"] == [*ids_of("px"), EOS]


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_item_is_the_beginning_of_the_sft_item(bos):
    row = Row("hello a", " a b", columns={"gold": 4})
    data = prompt_data([row, row], bos=bos)
    item = data[1]
    assert item == {"input_ids": [BOS] * bos + ids_of("hello") + [SPACE_A], "index": 1}
    assert sft(row, bos=bos)["input_ids"][: len(item["input_ids"])] == item["input_ids"]
    assert data.prompt_text(1) == "hello a"
    assert data.columns(1) == {"gold": 4}
    assert data.row(1) == row


def test_long_prompts():
    share = dict(max_prompt_len=3, truncation="share")
    assert prompt_data([Row("uvwxy")], **share)[0]["input_ids"] == ids_of("wxy")
    assert prompt_data([Row("uvwxy")], bos=True, **share)[0]["input_ids"] == [BOS, *ids_of("xy")]
    assert prompt_data([Row("uvwxy")], **share).prompt_text(0) == "uvwxy"
    for truncation in ("keep_prompt", "drop"):
        with pytest.raises(LeftOut, match="longer than --max_prompt_seq_len 3"):
            prompt_data([Row("uvwxy")], max_prompt_len=3, truncation=truncation)[0]


def test_prompt_without_tokens_names_its_row():
    with pytest.raises(ValueError, match="f.jsonl, line 9: the prompt '' has no tokens"):
        prompt_data([Row("", place="f.jsonl, line 9")])[0]


def test_missing_answers_name_the_row():
    with pytest.raises(ValueError, match="f.jsonl, line 9: no answer to learn from"):
        sft(Row("p", place="f.jsonl, line 9"))
    with pytest.raises(ValueError, match="f.jsonl, line 9: no pair to compare"):
        pair_data([Row("p", "c", place="f.jsonl, line 9")])[0]


def test_prepared_rows_are_counted_and_read_as_before(tmp_path):
    rows = [Row("p" * length, "a") for length in (1, 2, 3, 4, 50)]
    data = SFTDataset(rows, make_tokenizer(), max_seq_len=4, prompt_format="plain")
    before = [data[i] for i in range(3)]
    report = prepare(data, cache_dir=None, skip_bad_rows=False, name="rows")
    assert [data[i] for i in range(len(data))] == before
    assert [data.row(i).prompt for i in range(len(data))] == ["p", "pp", "ppp"]
    assert report.describe("--max_seq_len 4") == (
        "3 of 5 rows; 1 are longer than --max_seq_len 4 and are cut (longest: 52 tokens); "
        "2 (40.0%) left out: --max_seq_len 4 has no room for an answer"
    )
    assert report.num_tokens == 3 + 4 + 4


def test_the_digest_of_items_follows_content_and_order_and_not_the_cache(tmp_path):
    data = SFTData(data_path=[write_lines(tmp_path / "rows.jsonl", pairs(9))], eval_fraction=0.2)

    def digest(cache=None, picked=None):
        rows, _ = open_blends(data, step=2, needs="rejected")
        rows = rows if picked is None else [rows[i] for i in picked]
        dataset = PairDataset(rows, make_tokenizer(), max_seq_len=50, prompt_format="plain")
        assert dataset.items_digest is None
        prepare(dataset, cache_dir=cache, skip_bad_rows=False, name="rows")
        return dataset.items_digest

    in_order = digest(picked=[0, 1])
    assert in_order == digest(picked=[0, 1]) != digest(picked=[1, 0])
    assert digest(tmp_path / "cache") == digest(tmp_path / "cache") == digest()


def test_rows_that_cannot_be_shown_are_named_or_left_out(caplog):
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]
    refusing = "{% if messages | length > 1 %}{{ raise_exception('twice') }}{% endif %}a"
    rows = [Row(messages[: 1 + (i == 3)], place=f"f.jsonl, line {i}") for i in range(5)]

    def prompts():
        tokenizer = make_tokenizer(chat_template=refusing)
        return PromptDataset(rows, tokenizer, max_prompt_len=9, prompt_format="auto")

    with pytest.raises(ValueError, match=r"f.jsonl, line 3: .*twice.*\n.*--skip_bad_rows"):
        prepare(prompts(), cache_dir=None, skip_bad_rows=False, name="rows")
    data = prompts()
    report = prepare(data, cache_dir=None, skip_bad_rows=True, name="rows")
    assert (report.num_faults, list(report.kept), len(data)) == (1, [0, 1, 2, 4], 4)
    assert "rows: left out 1 of 5 rows that cannot be shown: f.jsonl, line 3" in caplog.text


def test_collate_text_pads_right_by_length():
    items = [
        {"input_ids": [5, PAD, 6], "labels": [-100, PAD, 6]},
        {"input_ids": [7], "labels": [7]},
    ]
    batch = collate_text(items, PAD)
    assert batch.input_ids.tolist() == [[5, PAD, 6], [7, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]  # a pad id inside a text counts
    assert batch.labels.tolist() == [[-100, PAD, 6], [7, -100, -100]]


def test_collate_pairs_puts_chosen_rows_first():
    items = [
        {"chosen_ids": [3, 4, EOS], "rejected_ids": [3, EOS], "num_prompt": 1, "margin": 0.5},
        {"chosen_ids": [6, 5, EOS], "rejected_ids": [6, 5, 8, 9], "num_prompt": 2, "margin": 0},
    ]
    batch = collate_pairs(items, EOS)  # the padding token is the end token
    assert batch.input_ids.tolist() == [
        [3, 4, EOS, EOS],
        [6, 5, EOS, EOS],
        [3, EOS, EOS, EOS],
        [6, 5, 8, 9],
    ]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [
        [-100, 4, EOS, -100],
        [-100, -100, EOS, -100],
        [-100, EOS, -100, -100],
        [-100, -100, 8, 9],
    ]
    assert batch.margins.tolist() == [0.5, 0, 0.5, 0]


def test_collate_prompts_pads_left():
    batch = collate_prompts(
        [{"input_ids": [3], "index": 7}, {"input_ids": [4, 5], "index": 2}], PAD
    )
    assert batch.input_ids.tolist() == [[PAD, 3], [4, 5]]
    assert batch.attention_mask.tolist() == [[0, 1], [1, 1]]
    assert batch.index.tolist() == [7, 2]


def test_the_cache_holds_the_same_items_and_follows_what_decides_them(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", pairs(30))
    data = SFTData(data_path=[path], data_split="0,1,0", eval_fraction=0.2)
    cache = tmp_path / "cache"

    def prepared(limit=50, tokenizer=None, **options):
        rows, _ = open_blends(data, step=2, needs="rejected")
        dataset = PairDataset(
            rows, tokenizer or make_tokenizer(), max_seq_len=limit, prompt_format="plain", **options
        )
        plain = [dataset[i] for i in range(len(dataset))] if limit == 50 else None
        prepare(dataset, cache_dir=cache, skip_bad_rows=False, name="rows")
        return dataset, plain

    dataset, plain = prepared()
    assert [dataset[i] for i in range(len(dataset))] == plain
    files = sorted(cache.glob("*.arrow"))
    again, _ = prepared()
    assert sorted(cache.glob("*.arrow")) == files and len(files) == 1
    assert [again[i] for i in range(len(again))] == plain
    assert again.items_digest == dataset.items_digest
    prepared(limit=9)
    prepared(tokenizer=make_tokenizer(bos=True))
    prepared(truncation="drop")
    write_lines(tmp_path / "rows.jsonl", pairs(30, begin=100))
    changed, _ = prepared()
    assert len(changed) == len(dataset) and changed.items_digest != dataset.items_digest
    assert len(list(cache.glob("*.arrow"))) == 5
    assert not list(cache.glob("*.tmp"))


def test_progress_names_the_rows(caplog, monkeypatch):
    monkeypatch.setattr(parallel, "PROGRESS_S", -1)
    data = SFTDataset([Row("p", "a")] * 3, make_tokenizer(), max_seq_len=9, prompt_format="plain")
    with caplog.at_level("INFO"):
        prepare(data, cache_dir=None, skip_bad_rows=False, name="training data")
    assert "training data: tokenized 3 of 3 rows" in caplog.text
