import pytest

from dschat.data.collate import collate_pairs, collate_prompts, collate_text
from dschat.data.datasets import PairDataset, PromptDataset, SFTDataset, truncation_report
from dschat.data.encoding import encode_answer, leading_ids
from dschat.data.row import Row
from dschat.data.splits import Blend
from tests.unit.data_helpers import BOS, CHAT_TEMPLATE, EOS, PAD, ids_of, make_tokenizer

SPACE_A = 259  # the one token of two bytes, " a"


def sft(row, *, bos=False, max_seq_len=100, prompt_format="plain", **options):
    tokenizer = make_tokenizer(bos=bos, **options)
    return SFTDataset(
        [row], tokenizer, max_seq_len=max_seq_len, prompt_format=prompt_format, end_token_id=EOS
    )[0]


def pair_data(rows, *, bos=False, max_seq_len=100, **options):
    tokenizer = make_tokenizer(bos=bos)
    options = {"prompt_format": "plain", "end_token_id": EOS, **options}
    return PairDataset(rows, tokenizer, max_seq_len=max_seq_len, **options)


def prompt_data(rows, *, bos=False, max_prompt_len=100, chat_template=None, prompt_format="plain"):
    tokenizer = make_tokenizer(bos=bos, chat_template=chat_template)
    return PromptDataset(
        rows, tokenizer, max_prompt_len=max_prompt_len, prompt_format=prompt_format
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
    item = sft(Row("x", "z"), bos=True, prompt_format="chat", chat_template=CHAT_TEMPLATE)
    assert item["input_ids"] == [BOS, *ids_of("<user>x</><assistant>z"), EOS]


def test_prompt_and_answer_are_tokenized_jointly():
    assert sft(Row("x", " az"))["labels"] == [-100, SPACE_A, *ids_of("z"), EOS]


def test_token_across_the_border_is_split_so_that_the_prompt_keeps_its_ids():
    row = Row("x ", "a")
    item = sft(row)
    assert item["input_ids"] == [*ids_of("x a"), EOS]  # not " a" as one token
    assert item["labels"] == [-100, -100, *ids_of("a"), EOS]
    assert prompt_data([row])[0]["input_ids"] == ids_of("x ")
    tokenizer = make_tokenizer()
    assert encode_answer(tokenizer, "x", ids_of("x"), " a", []) == [SPACE_A]


@pytest.mark.parametrize(
    "bos, max_seq_len, text, labels",
    [
        (False, 6, "uvwxy", 3),  # all of "uvw" + "xy" + </s>
        (False, 5, "vwxy", 3),
        (True, 5, "wxy", 3),  # BOS stays, "uv" is cut
        (True, 4, "xy", 3),
        (False, 3, "xy", 3),
        (False, 2, "xy", 2),  # the end token is cut
        (True, 2, "x", 1),
    ],
)
def test_truncation_takes_the_prompt_from_the_left_then_the_answer_from_the_right(
    bos, max_seq_len, text, labels
):
    item = sft(Row("uvw", "xy"), bos=bos, max_seq_len=max_seq_len)
    expected = [BOS] * bos + ids_of(text) + [EOS] * (labels == 3)
    assert item["input_ids"] == expected
    assert len(expected) == max_seq_len
    assert item["labels"] == [-100] * (max_seq_len - labels) + expected[max_seq_len - labels :]


def test_pair_item():
    item = pair_data([Row("p", "good", "no")], bos=True)[0]
    assert item == {
        "chosen_ids": [BOS, *ids_of("pgood"), EOS],
        "rejected_ids": [BOS, *ids_of("pno"), EOS],
        "num_prompt": 2,
    }


def test_pair_keeps_one_prompt_when_one_answer_is_too_long():
    item = pair_data([Row("uvw", "good", "no")], bos=True, max_seq_len=7)[0]
    answers = {
        "chosen_ids": [BOS, *ids_of("wgood"), EOS],
        "rejected_ids": [BOS, *ids_of("wno"), EOS],
    }
    assert item == {**answers, "num_prompt": 2}
    item = pair_data([Row("uvw", "good", "no")], bos=True, max_seq_len=4)[0]
    assert item == {
        "chosen_ids": [BOS, *ids_of("goo")],
        "rejected_ids": [BOS, *ids_of("no"), EOS],
        "num_prompt": 1,
    }


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


def test_long_prompt_keeps_its_end_and_bos():
    assert prompt_data([Row("uvwxy")], max_prompt_len=3)[0]["input_ids"] == ids_of("wxy")
    assert prompt_data([Row("uvwxy")], bos=True, max_prompt_len=3)[0]["input_ids"] == [
        BOS,
        *ids_of("xy"),
    ]
    assert prompt_data([Row("uvwxy")], max_prompt_len=3).prompt_text(0) == "uvwxy"


def test_prompt_without_tokens_names_its_row():
    with pytest.raises(ValueError, match="f.jsonl, line 9: the prompt '' has no tokens"):
        prompt_data([Row("", place="f.jsonl, line 9")])[0]


def test_missing_answers_name_the_row():
    with pytest.raises(ValueError, match="f.jsonl, line 9: no answer to learn from"):
        sft(Row("p", place="f.jsonl, line 9"))
    with pytest.raises(ValueError, match="f.jsonl, line 9: no pair to compare"):
        pair_data([Row("p", "c", place="f.jsonl, line 9")])[0]


def test_truncation_report():
    rows = [Row("p" * length, "a") for length in (1, 2, 3, 4, 50)]
    data = SFTDataset(
        rows, make_tokenizer(), max_seq_len=4, prompt_format="plain", end_token_id=EOS
    )
    assert truncation_report(data, sample=4) == (
        "2 of the first 4 rows are longer than --max_seq_len 4 and are cut (longest: 6 tokens)"
    )
    assert truncation_report(prompt_data(rows, max_prompt_len=4)).startswith(
        "1 of the first 5 rows are longer than --max_prompt_seq_len 4"
    )


def test_truncation_report_looks_at_rows_of_every_source():
    short = [Row("p", "a")] * 5000
    long = [Row("p" * 9, "a")] * 5000
    read = []

    class Rows:
        def row(self, raw, *, place):
            read.append(raw)
            return raw

    class Pieces(list):
        def place(self, at):
            return ""

    def report(*pieces):
        read.clear()
        return truncation_report(
            prompt_data(Blend([(Rows(), Pieces(piece)) for piece in pieces]), max_prompt_len=4)
        )

    assert report(short, long).startswith(
        "500 of 1000 rows, the first of each source, are longer than"
    )
    assert report(short * 100, long).startswith(
        "50 of 1000 rows, the first of each source, are longer than"
    )
    assert report(short * 100, long[:3]).startswith("3 of 1000 rows")
    assert report(*[short] * 40, long).startswith("24 of 1000 rows")
    assert len(read) == 1000
    assert report(short).startswith("0 of the first 1000 rows")


def test_pairs_that_are_equal_once_cut_are_counted_and_refused_if_all_are():
    far = Row("p", " same but", " same and", place="f.jsonl, line 7")
    near = Row("p", " but", " and")
    options = dict(prompt_format="plain", end_token_id=EOS)

    def report(rows, limit):
        return truncation_report(PairDataset(rows, make_tokenizer(), max_seq_len=limit, **options))

    assert report([far, near], 5).endswith(
        "; 1 of these pairs have two equal answers once cut, and teach nothing"
    )
    assert "equal" not in report([far, near], 8)
    dataset = PairDataset([far], make_tokenizer(), max_seq_len=5, **options)
    assert "1 of these pairs have two equal answers" in truncation_report(dataset, trained=False)
    with pytest.raises(
        ValueError,
        match="--max_seq_len 5: f.jsonl, line 7: .* all 1 pairs looked at. "
        "Give a larger --max_seq_len",
    ):
        report([far], 5)


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
        {"chosen_ids": [3, 4, EOS], "rejected_ids": [3, EOS], "num_prompt": 1},
        {"chosen_ids": [6, 5, EOS], "rejected_ids": [6, 5, 8, 9], "num_prompt": 2},
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


def test_collate_prompts_pads_left():
    batch = collate_prompts(
        [{"input_ids": [3], "index": 7}, {"input_ids": [4, 5], "index": 2}], PAD
    )
    assert batch.input_ids.tolist() == [[PAD, 3], [4, 5]]
    assert batch.attention_mask.tolist() == [[0, 1], [1, 1]]
    assert batch.index.tolist() == [7, 2]
