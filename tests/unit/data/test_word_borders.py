"""Answers are tokenized with the end of their prompt only, if no token spans its beginning."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dschat.data.encoding import Encoder
from dschat.data.row import Row
from dschat.data.word_borders import last_word_border, splits_at_words

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
@settings(max_examples=150)
@given(
    prompt=st.text(st.sampled_from("ab ü.\n1'ж中\u0301"), max_size=30),
    answer=st.text(st.sampled_from("ab ü.\n1'ж中\u0301"), min_size=1, max_size=8),
)
def test_ids_are_those_of_the_whole_text(name, prompt, answer):
    parts, whole = (Encoder(SPLITTING[name], prompt_format="plain") for _ in range(2))
    assert parts._splits_at_words
    whole._splits_at_words = False
    rows = [parts.format.render(Row(text, answer, answer[::-1])) for text in ("one " + prompt, "")]
    assert parts.encode_all(rows) == whole.encode_all(rows)


@pytest.mark.parametrize("name", OTHERS)
def test_tokenizers_that_look_across_words(name):
    assert not splits_at_words(OTHERS[name])


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
