"""Places in a text at which a tokenizer never joins what is on both sides.

Between such places a text can be tokenized in parts: a prompt once, and only its last words again
with each answer, and a word that has come before not at all.
"""

import re

from transformers import PreTrainedTokenizerBase

REACH = 400  # characters before the end of a text that are searched
# Letters of Latin, Greek and Cyrillic, and the marks after a word that leave the next space alone.
LETTERS = "A-Za-zÀ-ÖØ-öø-ɏΑ-ΡΣ-ϡЀ-ҁ"
MARKS = ",.;:?!"
BORDER = re.compile(f"(?= [{LETTERS}])(?<=[{LETTERS}{MARKS}])")
PROBES = (
    "one two three",
    "Der Bär mag Öl",
    "один два три",
    "one, two. three; four: five? six! seven",
)


def split_words(text: str) -> list[str]:
    """Split a text before each single space between two words; marks stay with their word."""
    return BORDER.split(text)


def last_word_border(text: str) -> int:
    """Return the position of the last space between two letters near the end; 0: there is none."""
    # Digits and marks do not count: some tokenizers group them across a space.
    least = max(1, len(text) - REACH)
    at = text.rfind(" ", least, len(text) - 1)
    while at > 0 and not (text[at - 1].isalpha() and text[at + 1].isalpha()):
        at = text.rfind(" ", least, at)
    return max(0, at)


def splits_at_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer cuts a text before each space between words, first of all.

    The first word may have a mark at its end. Then no token and no merge spans such a place, and
    the ids before it do not depend on the text after it. Tokenizers without a pre-tokenizer (Llama
    2, Gemma) merge across words, and the added tokens of a few have spaces.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return False
    for token in tokenizer.added_tokens_decoder.values():
        takes_spaces = token.lstrip or token.rstrip
        ends = (token.content[:1], token.content[-1:])
        ends_in_word = any(end.isalpha() or end in MARKS for end in ends)
        if " " in token.content or (takes_spaces and ends_in_word):
            return False
    return all(_splits(tokenizer, probe) for probe in PROBES)


def _splits(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    backend = tokenizer.backend_tokenizer
    shown = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    pieces = [range(*place) for _, place in backend.pre_tokenizer.pre_tokenize_str(shown)]
    if any(start in piece[1:] for start in _spaces(shown) for piece in pieces):
        return False
    whole, *words = tokenizer([text, *split_words(text)], add_special_tokens=False)["input_ids"]
    return whole == [token for word in words for token in word]


def _spaces(text: str) -> list[int]:
    return [at for at, char in enumerate(text) if char == " "]
