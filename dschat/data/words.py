"""Tokenization by words, each of which is tokenized once.

A tokenizer is some ten times slower than looking up a word that has come before, and most words of
a data set have.
"""

import bisect
from collections.abc import Sequence
from itertools import accumulate, chain

from transformers import PreTrainedTokenizerBase

from dschat.data.word_borders import split_words, splits_at_words

# Bounds of what is kept: some 40 MB.
MAX_WORDS = 2**16
MAX_CHARACTERS = 2**20

Ranges = tuple[tuple[int, int], ...]  # [begin, end) of characters or of ids


class WordTokenizer:
    """Gives texts the ids that their tokenizer gives them, without special tokens.

    Args:
        tokenizer: if it does not cut texts at words first of all, texts are tokenized as wholes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.splits = splits_at_words(tokenizer)
        self._known: dict[str, list[int]] = {}
        self._num_characters = 0  # of the known words

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; many at a time are faster."""
        words, known = self._look_up(texts)
        return [_ids(parts, known) for parts in words]

    def tokenize_with_ranges(
        self, texts: Sequence[str], ranges: Sequence[Ranges]
    ) -> list[tuple[list[int], Ranges]]:
        """Return the ids of each text, and which of them stand for given ranges of characters.

        An id stands for a range if all its characters are in it.

        Args:
            texts: the texts.
            ranges: of the characters of each text, in ascending order.
        """
        words, known = self._look_up(texts)
        if not self.tokenizer.is_fast:
            return [
                (_ids(parts, known), self._count_ids(text, wanted))
                for text, parts, wanted in zip(texts, words, ranges, strict=True)
            ]
        begins = [[0, *accumulate(map(len, parts))] for parts in words]
        places = self._places_in_cut_words(words, begins, ranges)
        found = []
        for parts, starts, wanted in zip(words, begins, ranges, strict=True):
            ids = _ids(parts, known)
            if wanted:
                counts = [0, *accumulate(len(known[word]) for word in parts)]
                wanted = _ranges_of_ids(wanted, parts, starts, counts, places)
            found.append((ids, wanted))
        return found

    def _look_up(self, texts: Sequence[str]) -> tuple[list[list[str]], dict[str, list[int]]]:
        """Return the words of each text, and the ids of them all."""
        words = [split_words(text) if self.splits else [text] for text in texts]
        # Another thread may do the same: it gets the same dictionary or a new one.
        known = self._known if self.splits else {}
        new = list(set(chain.from_iterable(words)).difference(known))
        if new:
            # verbose=False: the tokenizer would warn about long texts, but they are cut after this.
            ids = self.tokenizer(
                new, add_special_tokens=False, return_attention_mask=False, verbose=False
            )["input_ids"]
            known.update(zip(new, ids, strict=True))
            self._num_characters += sum(map(len, new))
        if len(known) > MAX_WORDS or self._num_characters > MAX_CHARACTERS:
            self._known, self._num_characters = {}, 0
        return words, known

    def _places_in_cut_words(
        self, words: list[list[str]], begins: list[list[int]], ranges: Sequence[Ranges]
    ) -> dict[str, "IdPlaces"]:
        """Return the places of the ids of the words inside which a range begins or ends."""
        cut = set()
        for parts, starts, wanted in zip(words, begins, ranges, strict=True):
            for place in chain.from_iterable(wanted):
                number, within = _locate(starts, place)
                if within:
                    cut.add(parts[number])
        if not cut:
            return {}
        found = self.tokenizer(
            list(cut), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        places = (IdPlaces(spans) for spans in found["offset_mapping"])
        return dict(zip(cut, places, strict=True))

    def _count_ids(self, text: str, ranges: Ranges) -> Ranges:
        """Return the ids of ranges for a tokenizer that does not tell its ids' characters."""
        borders = [text[:place] for place in chain.from_iterable(ranges)]
        counts = [len(ids) for ids in self.tokenize(borders)]
        return tuple(zip(counts[::2], counts[1::2], strict=True))


def _ids(words: list[str], known: dict[str, list[int]]) -> list[int]:
    return list(chain.from_iterable(map(known.__getitem__, words)))


def _locate(begins: list[int], place: int) -> tuple[int, int]:
    """Return the number of the word that holds a character, and the character's place in it."""
    number = bisect.bisect_right(begins, place) - 1
    return number, place - begins[number]


def _ranges_of_ids(
    ranges: Ranges,
    words: list[str],
    begins: list[int],
    counts: list[int],
    places: dict[str, "IdPlaces"],
) -> Ranges:
    """Return the ids that stand for ranges of a text's characters; empty ranges are left out.

    Args:
        ranges: of characters.
        words: of the text.
        begins: the first character of each word, and the end of the text.
        counts: the ids before each word, and those of the text.
        places: of the ids of the words inside which a range begins or ends.
    """
    found = []
    for begin, end in ranges:
        number, within = _locate(begins, begin)
        first = counts[number]
        if within:
            first += places[words[number]].first_from(within)
        number, within = _locate(begins, end)
        stop = counts[number]
        if within:
            stop += places[words[number]].number_until(within)
        if first < stop:
            found.append((first, stop))
    return tuple(found)


class IdPlaces:
    """The characters of a word's ids, in their order.

    A word may be as long as a text and hold thousands of ranges, so they are found by bisection.
    """

    def __init__(self, spans: list[tuple[int, int]]):
        """
        Args:
            spans: the first character of each id and the one after its last. Ids without
                characters, as some tokenizers add, are in no range.
        """
        self._total = len(spans)
        self._numbers = [i for i, (begin, end) in enumerate(spans) if begin < end]
        self._begins = [spans[i][0] for i in self._numbers]
        self._ends = [spans[i][1] for i in self._numbers]

    def first_from(self, place: int) -> int:
        """Return the first id whose characters are all from `place` on, or the number of ids."""
        index = bisect.bisect_left(self._begins, place)
        return self._numbers[index] if index < len(self._numbers) else self._total

    def number_until(self, place: int) -> int:
        """Return the number of ids up to the last one whose characters are all before `place`."""
        index = bisect.bisect_right(self._ends, place)
        return self._numbers[index - 1] + 1 if index else 0
