"""Rows to token ids, one at a time as the loader asks: nothing is padded, cached or stored.

A text that is too long loses the beginning of its prompt first (a leading BOS stays), then the end of its answer, and
with it the end token: a cut answer is not taught to stop.
"""

import random
from typing import Sequence

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dschat.data.encoding import encode_answer, encode_prompt, leading_ids, trim_prompt
from dschat.data.row import Row
from dschat.data.splits import first_of_each
from dschat.data.templates import render

IGNORED = -100
MIN_CUT_ANSWER = 2
LEAST_SAMPLED = (
    50  # rows of each source that truncation_report looks at, if there is room for as many of all
)


class _TextDataset(Dataset):
    """What the three share: rows, a tokenizer, and the length limit under its flag's name."""

    limit_flag = "--max_seq_len"

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int,
        prompt_format: str,
    ):
        self.rows = rows
        self.tokenizer = tokenizer
        self.limit = limit
        self.prompt_format = prompt_format
        self.lead = leading_ids(tokenizer)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        """The row behind item `index`."""
        return self.rows[index]

    def num_tokens(self, index: int) -> int:
        """The length of item `index` before anything is cut."""
        raise NotImplementedError

    def is_tie(self, index: int) -> bool:
        """True where item `index` is a pair of which nothing differs."""
        return False

    def _texts(self, index: int) -> tuple[Row, str, str | None, str | None]:
        row = self.rows[index]
        return row, *render(row, prompt_format=self.prompt_format, tokenizer=self.tokenizer)

    def _answer_ids(
        self, prompt_text: str, prompt_ids: list[int], answer: str, end_token_id: int
    ) -> list[int]:
        ids = encode_answer(self.tokenizer, prompt_text, prompt_ids, answer, self.lead)
        return ids if ids[-1:] == [end_token_id] else [*ids, end_token_id]


class SFTDataset(_TextDataset):
    """Step 1: item = {"input_ids": [T], "labels": [T]}, lists of int; labels are -100 on the prompt.

    Args:
        rows: with a chosen answer each, else reading an item raises ValueError.
        max_seq_len: the longest item in tokens.
        prompt_format: see `templates.render`.
        end_token_id: closes every answer that is not cut.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_len: int,
        prompt_format: str,
        end_token_id: int,
    ):
        super().__init__(rows, tokenizer, limit=max_seq_len, prompt_format=prompt_format)
        self.end_token_id = end_token_id

    def __getitem__(self, index: int) -> dict:
        prompt, answer = self._ids(index)
        prompt = trim_prompt(prompt, room=self.limit - len(answer), num_lead=len(self.lead))
        answer = answer[: self.limit - len(prompt)]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    def num_tokens(self, index: int) -> int:
        return sum(map(len, self._ids(index)))

    def _ids(self, index: int) -> tuple[list[int], list[int]]:
        row, prompt_text, chosen, _ = self._texts(index)
        if chosen is None:
            raise ValueError(
                f"{row.place or f'row {index}'}: no answer to learn from; give chosen or response."
            )
        prompt = encode_prompt(self.tokenizer, prompt_text, self.lead)
        return prompt, self._answer_ids(prompt_text, prompt, chosen, self.end_token_id)


class PairDataset(_TextDataset):
    """Step 2 and DPO: item = {"chosen_ids": [T], "rejected_ids": [T'], "num_prompt": P}, lists of int that both begin with
    the same P prompt ids.

    Args:
        rows: with two answers each, else reading an item raises ValueError.
        max_seq_len, prompt_format, end_token_id: as in `SFTDataset`.
        cut_fraction: the share of the pairs whose two answers are cut to one random number of tokens, at least 2 and
            enough to keep them different, without the end token: the reward model learns to score unfinished answers,
            and cannot take the end token itself for quality.
        seed: with the row's index decides which pairs are cut, and where.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_len: int,
        prompt_format: str,
        end_token_id: int,
        cut_fraction: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(rows, tokenizer, limit=max_seq_len, prompt_format=prompt_format)
        self.end_token_id = end_token_id
        self.cut_fraction = cut_fraction
        self.seed = seed

    def __getitem__(self, index: int) -> dict:
        prompt, chosen, rejected = self._ids(index)
        length = self._cut_length(index, chosen[:-1], rejected[:-1])
        if length is not None:
            chosen, rejected = chosen[:length], rejected[:length]
        # One prompt for both, so that a longer answer is not also told by a shorter prompt.
        room = self.limit - max(len(chosen), len(rejected))
        prompt = trim_prompt(prompt, room=room, num_lead=len(self.lead))
        room = self.limit - len(prompt)
        answers = {"chosen_ids": prompt + chosen[:room], "rejected_ids": prompt + rejected[:room]}
        return {**answers, "num_prompt": len(prompt)}

    def num_tokens(self, index: int) -> int:
        prompt, chosen, rejected = self._ids(index)
        return len(prompt) + max(len(chosen), len(rejected))

    def is_tie(self, index: int) -> bool:
        item = self[index]
        return item["chosen_ids"] == item["rejected_ids"]

    def _ids(self, index: int) -> tuple[list[int], list[int], list[int]]:
        row, prompt_text, chosen, rejected = self._texts(index)
        if chosen is None or rejected is None:
            raise ValueError(
                f"{row.place or f'row {index}'}: no pair to compare; give chosen and rejected."
            )
        prompt = encode_prompt(self.tokenizer, prompt_text, self.lead)
        answers = [
            self._answer_ids(prompt_text, prompt, text, self.end_token_id)
            for text in (chosen, rejected)
        ]
        return prompt, *answers

    def _cut_length(self, index: int, chosen: list[int], rejected: list[int]) -> int | None:
        """Tokens left of both answers (given without end token) of a pair that is cut, else None."""
        # Seeding with a text hashes it by sha512, so that neighbouring indices are unrelated.
        draw = random.Random(f"cut {self.seed} {index}")
        if draw.random() >= self.cut_fraction:
            return None
        shorter = min(len(chosen), len(rejected))
        common = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
        shortest = max(MIN_CUT_ANSWER, common + 1)
        return draw.randint(shortest, shorter) if shortest <= shorter else None


class PromptDataset(_TextDataset):
    """Step 3: item = {"input_ids": [P] list of int, "index": int}.

    Args:
        max_prompt_len: longer prompts lose their beginning.
        prompt_format: see `templates.render`.

    Reading an item raises ValueError, naming the row, if its prompt has no tokens at all.
    """

    limit_flag = "--max_prompt_seq_len"

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_len: int,
        prompt_format: str,
    ):
        super().__init__(rows, tokenizer, limit=max_prompt_len, prompt_format=prompt_format)

    def __getitem__(self, index: int) -> dict:
        prompt = self._prompt_ids(index)
        return {
            "input_ids": trim_prompt(prompt, room=self.limit, num_lead=len(self.lead)),
            "index": index,
        }

    def num_tokens(self, index: int) -> int:
        return len(self._prompt_ids(index))

    def prompt_text(self, index: int) -> str:
        """The whole prompt as rendered, whatever is cut of its ids."""
        return self._texts(index)[1]

    def columns(self, index: int) -> dict:
        """The row's fields besides prompt and answers, for a Python reward function."""
        return self.rows[index].columns

    def _prompt_ids(self, index: int) -> list[int]:
        row, prompt_text, _, _ = self._texts(index)
        ids = encode_prompt(self.tokenizer, prompt_text, self.lead)
        if not ids:
            raise ValueError(
                f"{row.place or f'row {index}'}: the prompt {prompt_text!r} has no tokens, and generation needs one. "
                "Give it a text, or leave the row out."
            )
        return ids


def truncation_report(dataset: _TextDataset, sample: int = 1000, *, trained: bool = True) -> str:
    """One line: how many of the first rows of each source are longer than the limit, and the longest of them.

    Args:
        sample: the most rows to look at.
        trained: the rows are trained on, and not for evaluation alone.

    Raises:
        ValueError: a row that the prompt format cannot show, or rows that are trained on are all pairs of which the limit
            leaves no difference.
    """
    sampled = first_of_each(dataset.rows, sample, least=LEAST_SAMPLED)
    lengths = [dataset.num_tokens(index) for index in sampled]
    cut = [index for index, length in zip(sampled, lengths) if length > dataset.limit]
    num_ties = sum(dataset.is_tie(index) for index in cut)
    limit = f"{dataset.limit_flag} {dataset.limit}"
    if trained and num_ties and num_ties == len(lengths):
        place = dataset.row(0).place
        raise ValueError(
            f"{limit}: {place or 'row 0'}: its two answers are equal once they are cut to so many tokens, and so are those of all "
            f"{num_ties} pairs looked at. Give a larger {dataset.limit_flag}, or pairs that differ sooner."
        )
    from_one = sampled == list(range(len(sampled)))
    rows = (
        f"the first {len(lengths)} rows"
        if from_one
        else f"{len(lengths)} rows, the first of each source,"
    )
    return (
        f"{len(cut)} of {rows} are longer than {limit} and are cut "
        f"(longest: {max(lengths, default=0)} tokens)"
        + (
            f"; {num_ties} pairs of these have no difference left, and teach nothing"
            if num_ties
            else ""
        )
    )
