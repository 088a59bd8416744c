"""Places in a text at which a tokenizer never joins what is on both sides.

Between such places a text can be tokenized in parts: a prompt once, and only its last words again
with each answer.
"""

from transformers import PreTrainedTokenizerBase

REACH = 400  # characters before the end of a text that are searched
PROBES = ("one two three", "Der Bär mag Öl", "один два три")


def last_word_border(text: str) -> int:
    """Return the position of the last space between two letters near the end; 0: there is none."""
    # Digits and marks do not count: some tokenizers group them across a space.
    least = max(1, len(text) - REACH)
    at = text.rfind(" ", least, len(text) - 1)
    while at > 0 and not (text[at - 1].isalpha() and text[at + 1].isalpha()):
        at = text.rfind(" ", least, at)
    return max(0, at)


def splits_at_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer cuts a text before each space between letters, first of all.

    Then no token and no merge spans such a place, and the ids before it do not depend on the text
    after it. Tokenizers without a pre-tokenizer (Llama 2, Gemma) merge across words, and the added
    tokens of a few have spaces.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return False
    for token in tokenizer.added_tokens_decoder.values():
        takes_spaces = token.lstrip or token.rstrip
        ends_in_letter = token.content[:1].isalpha() or token.content[-1:].isalpha()
        if " " in token.content or (takes_spaces and ends_in_letter):
            return False
    return all(_splits(tokenizer, probe) for probe in PROBES)


def _splits(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    backend = tokenizer.backend_tokenizer
    shown = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    pieces = [range(*place) for _, place in backend.pre_tokenizer.pre_tokenize_str(shown)]
    if any(start in piece[1:] for start in _spaces(shown) for piece in pieces):
        return False
    whole = _ids(tokenizer, text)
    return all(
        whole == _ids(tokenizer, text[:start]) + _ids(tokenizer, text[start:])
        for start in _spaces(text)
    )


def _spaces(text: str) -> list[int]:
    return [at for at, char in enumerate(text) if char == " "]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
