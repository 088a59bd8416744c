"""Answers are tokenized with the end of their prompt only, if no token spans its beginning."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dschat.data import words
from dschat.data.encoding import Encoder
from dschat.data.row import Row
from dschat.data.word_borders import last_word_border, split_words, splits_at_words
from dschat.data.words import WordTokenizer

CORPUS = ["one two three four. Is it so?\n\nHuman: don't 12 34", "Der Bär mag Öl", "один два три"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel.alphabet()


def trained(pre_tokenizer, normalizer=None, unigram=False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": ["<unk>", "</s>"], "show_progress": False, "vocab_size": 420}
    if unigram:
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        trainer = trainers.BpeTrainer(initial_alphabet=BYTES, **options)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


SPLITTING = {
    "a space in front": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "GPT-2": trained(byte_level()),
    "Llama 3": trained(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), byte_level(use_regex=False)]
        ),
        normalizers.NFC(),
    ),
    "SentencePiece by words": trained(
        pre_tokenizers.Metaspace(prepend_scheme="first"), normalizers.NFKC(), unigram=True
    ),
}
OTHERS = {
    "Llama 2": trained(
        None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "Gemma": trained(
        pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")
    ),
    "words by twos": trained(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\S+ \S+|\s"), "isolated"), byte_level(use_regex=False)]
        )
    ),
}


@pytest.mark.parametrize("name", SPLITTING)
@settings(max_examples=150, deadline=None)
@given(
    prompt=st.text(st.sampled_from("ab ü.\n1'ж中\u0301"), max_size=30),
    answer=st.text(st.sampled_from("ab ü.\n1'ж中\u0301"), min_size=1, max_size=8),
)
def test_ids_are_those_of_the_whole_text(name, prompt, answer):
    parts, whole = (Encoder(SPLITTING[name], prompt_format="plain") for _ in range(2))
    assert parts._words.splits
    whole._words.splits = False
    rows = [parts.format.render(Row(text, answer, answer[::-1])) for text in ("one " + prompt, "")]
    assert parts.encode_all(rows) == whole.encode_all(rows)


@pytest.mark.parametrize("name", OTHERS)
def test_tokenizers_that_look_across_words(name):
    assert not splits_at_words(OTHERS[name])


TEXTS = st.text(st.sampled_from("ab ü.,\n1'ж中\u0301"), max_size=30)


def ids_in_range(spans, begin, end) -> list[int]:
    return [i for i, (b, e) in enumerate(spans) if begin <= b < e <= end]


@pytest.mark.parametrize("name", [*SPLITTING, *OTHERS])
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, max_size=3), places=st.lists(st.integers(0, 12), max_size=4))
def test_words_have_the_ids_and_places_of_the_whole_text(name, texts, places):
    tokenizer = {**SPLITTING, **OTHERS}[name]
    texts = [f"one {text} two, ab" for text in texts]
    places = sorted(places)
    ranges = tuple(zip(places[::2], places[1::2], strict=False))
    whole = [
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts
    ]
    expected = []
    for text, found in zip(texts, whole, strict=True):
        ids = [ids_in_range(found["offset_mapping"], *wanted) for wanted in ranges]
        expected.append((found["input_ids"], tuple((i[0], i[-1] + 1) for i in ids if i)))
    tokenize = WordTokenizer(tokenizer)
    assert tokenize.tokenize_with_ranges(texts, [ranges] * len(texts)) == expected
    assert tokenize.tokenize(texts) == [ids for ids, _ in expected]


def test_a_word_is_tokenized_once():
    tokenize = WordTokenizer(trained(byte_level()))
    seen = []
    tokenize.tokenizer = lambda texts, **_: seen.extend(texts) or {"input_ids": [[1]] * len(texts)}
    assert tokenize.tokenize(["one two two", "two one two"]) == [[1] * 3, [1] * 3]
    assert tokenize.tokenize(["one two"]) == [[1, 1]]
    assert sorted(seen) == [" one", " two", "one", "two"]


@pytest.mark.parametrize("bound", ["MAX_WORDS", "MAX_CHARACTERS"])
def test_the_words_that_are_kept_are_bounded(monkeypatch, bound):
    monkeypatch.setattr(words, bound, 20)
    tokenizer = trained(byte_level())
    tokenize = WordTokenizer(tokenizer)
    for number in range(30):
        text = f"one {'b' * number} two"
        assert tokenize.tokenize([text]) == [tokenizer(text)["input_ids"]]
        assert len(tokenize._known) <= 20


def test_words_keep_their_marks_and_numbers():
    text = "one two, three 4 five (six)\n\nHuman: so"
    assert split_words(text) == ["one", " two,", " three 4 five (six)\n\nHuman:", " so"]


def test_an_added_token_with_a_space():
    tokenizer = trained(byte_level())
    assert splits_at_words(tokenizer)
    tokenizer.add_tokens(["two three"])
    assert not splits_at_words(tokenizer)


def test_the_last_border():
    text = "one two 3 four.\n\nAssistant:"
    assert last_word_border(text) == text.index(" two")
    assert last_word_border("1 2\n3") == 0 and last_word_border("") == 0
    assert last_word_border("a ") == 0 and last_word_border(" a b") == 2
