"""Datasets that tokenize rows on access; nothing is padded, cached or stored.

A text over the limit first loses the beginning of its prompt (a leading BOS stays), then the end of
its answer. A cut answer loses its end token too, so that the model is not taught to stop there.
"""

import random
from collections.abc import Sequence

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dschat.data.encoding import encode_answer, encode_prompt, leading_ids, trim_prompt
from dschat.data.row import Row
from dschat.data.splits import first_indices_per_source
from dschat.data.templates import render

IGNORED = -100
MIN_CUT_ANSWER = 2
# Rows of each source that truncation_report looks at, if its sample has room for that many of each.
MIN_SAMPLED_PER_SOURCE = 50


class _TextDataset(Dataset):
    """Base of the three datasets: rows, a tokenizer, and a length limit with its flag's name."""

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
        """Return the row that item `index` is made of."""
        return self.rows[index]

    def num_tokens(self, index: int) -> int:
        """Return the length of item `index` before truncation."""
        raise NotImplementedError

    def is_tie(self, index: int) -> bool:
        """Return whether item `index` is a pair of two equal answers."""
        return False

    def _render(self, index: int) -> tuple[Row, str, str | None, str | None]:
        row = self.rows[index]
        texts = render(row, prompt_format=self.prompt_format, tokenizer=self.tokenizer)
        return row, *texts

    def _answer_ids(
        self, prompt_text: str, prompt_ids: list[int], answer: str, end_token_id: int
    ) -> list[int]:
        ids = encode_answer(self.tokenizer, prompt_text, prompt_ids, answer, self.lead)
        return ids if ids[-1:] == [end_token_id] else [*ids, end_token_id]


class SFTDataset(_TextDataset):
    """Step 1: item = {"input_ids": [T], "labels": [T]}, both lists of int.

    Labels are -100 on the prompt.

    Args:
        rows: each with a chosen answer; reading an item without one raises ValueError.
        tokenizer: encodes prompts and answers.
        max_seq_len: the longest item in tokens.
        prompt_format: see `templates.render`.
        end_token_id: ends every answer that is not cut.
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
        """Return item `index`, cut to `max_seq_len`."""
        prompt, answer = self._encode(index)
        prompt = trim_prompt(prompt, room=self.limit - len(answer), num_lead=len(self.lead))
        answer = answer[: self.limit - len(prompt)]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    def num_tokens(self, index: int) -> int:
        """Return the length of prompt and answer before truncation."""
        prompt, answer = self._encode(index)
        return len(prompt) + len(answer)

    def _encode(self, index: int) -> tuple[list[int], list[int]]:
        row, prompt_text, chosen, _ = self._render(index)
        if chosen is None:
            raise ValueError(
                f"{row.place or f'row {index}'}: no answer to learn from; give chosen or response."
            )
        prompt = encode_prompt(self.tokenizer, prompt_text, self.lead)
        return prompt, self._answer_ids(prompt_text, prompt, chosen, self.end_token_id)


class PairDataset(_TextDataset):
    """Step 2 and DPO: item = {"chosen_ids": [T], "rejected_ids": [T'], "num_prompt": P}.

    Both are lists of int and begin with the same P prompt ids.

    Args:
        rows: each with two answers; reading an item without them raises ValueError.
        tokenizer: encodes prompts and answers.
        max_seq_len: the longest item in tokens.
        prompt_format: see `templates.render`.
        end_token_id: ends every answer that is not cut.
        cut_fraction: the share of pairs whose answers are both cut to one random number of tokens,
            without the end token. At least 2 tokens are left, and enough to keep the answers
            different. The reward model thus learns to score unfinished answers, and cannot take the
            end token itself for quality.
        seed: with the row's index, decides which pairs are cut, and where.
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
        """Return item `index`, with each answer cut to `max_seq_len`."""
        prompt, chosen, rejected = self._encode(index)
        length = self._cut_length(index, chosen[:-1], rejected[:-1])
        if length is not None:
            chosen = chosen[:length]
            rejected = rejected[:length]
        # Both get the same prompt: otherwise a shorter prompt would give away the longer answer.
        room = self.limit - max(len(chosen), len(rejected))
        prompt = trim_prompt(prompt, room=room, num_lead=len(self.lead))
        room = self.limit - len(prompt)
        return {
            "chosen_ids": prompt + chosen[:room],
            "rejected_ids": prompt + rejected[:room],
            "num_prompt": len(prompt),
        }

    def num_tokens(self, index: int) -> int:
        """Return the length of the prompt and the longer answer before truncation."""
        prompt, chosen, rejected = self._encode(index)
        return len(prompt) + max(len(chosen), len(rejected))

    def is_tie(self, index: int) -> bool:
        """Return whether truncation has made the two answers of item `index` equal."""
        item = self[index]
        return item["chosen_ids"] == item["rejected_ids"]

    def _encode(self, index: int) -> tuple[list[int], list[int], list[int]]:
        row, prompt_text, chosen, rejected = self._render(index)
        if chosen is None or rejected is None:
            raise ValueError(
                f"{row.place or f'row {index}'}: no pair to compare; give chosen and rejected."
            )
        prompt = encode_prompt(self.tokenizer, prompt_text, self.lead)
        chosen_ids = self._answer_ids(prompt_text, prompt, chosen, self.end_token_id)
        rejected_ids = self._answer_ids(prompt_text, prompt, rejected, self.end_token_id)
        return prompt, chosen_ids, rejected_ids

    def _cut_length(self, index: int, chosen: list[int], rejected: list[int]) -> int | None:
        """Return the number of tokens to keep of both answers, or None if the pair is not cut.

        The answers are given without their end token.
        """
        # A string seed is hashed with sha512, so that neighbouring indices are unrelated.
        draw = random.Random(f"cut {self.seed} {index}")
        if draw.random() >= self.cut_fraction:
            return None
        shorter = min(len(chosen), len(rejected))
        common = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
        shortest = max(MIN_CUT_ANSWER, common + 1)
        return draw.randint(shortest, shorter) if shortest <= shorter else None


class PromptDataset(_TextDataset):
    """Step 3: item = {"input_ids": [P] list of int, "index": int}.

    Reading an item raises ValueError, naming the row, if its prompt has no tokens at all.

    Args:
        rows: only their prompts are used.
        tokenizer: encodes the prompts.
        max_prompt_len: longer prompts lose their beginning.
        prompt_format: see `templates.render`.
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
        """Return item `index`, cut to `max_prompt_len`."""
        prompt = self._encode(index)
        return {
            "input_ids": trim_prompt(prompt, room=self.limit, num_lead=len(self.lead)),
            "index": index,
        }

    def num_tokens(self, index: int) -> int:
        """Return the length of the prompt before truncation."""
        return len(self._encode(index))

    def prompt_text(self, index: int) -> str:
        """Return the whole rendered prompt, even if its ids are cut."""
        return self._render(index)[1]

    def columns(self, index: int) -> dict:
        """Return the row's fields besides prompt and answers, for a Python reward function."""
        return self.rows[index].columns

    def _encode(self, index: int) -> list[int]:
        row, prompt_text, _, _ = self._render(index)
        ids = encode_prompt(self.tokenizer, prompt_text, self.lead)
        if not ids:
            raise ValueError(
                f"{row.place or f'row {index}'}: the prompt {prompt_text!r} has no tokens, and "
                "generation needs at least one. Give the row a prompt, or remove it."
            )
        return ids


def truncation_report(dataset: _TextDataset, sample: int = 1000, *, trained: bool = True) -> str:
    """Report in one line how many of the first rows of each source are over the length limit.

    Args:
        dataset: the rows, and the limit.
        sample: the most rows to look at.
        trained: the rows are for training, not only for evaluation.

    Returns:
        The counts, and the length of the longest row looked at.

    Raises:
        ValueError: a row does not fit the prompt format, or truncation makes the two answers of
            every training pair equal.
    """
    indices = first_indices_per_source(dataset.rows, sample, least=MIN_SAMPLED_PER_SOURCE)
    lengths = [dataset.num_tokens(index) for index in indices]
    cut = [index for index, length in zip(indices, lengths, strict=True) if length > dataset.limit]
    num_ties = sum(dataset.is_tie(index) for index in cut)
    limit = f"{dataset.limit_flag} {dataset.limit}"
    if trained and num_ties and num_ties == len(lengths):
        place = dataset.row(0).place or "row 0"
        raise ValueError(
            f"{limit}: {place}: its two answers are equal once they are cut to this many tokens, "
            f"and so are those of all {num_ties} pairs looked at. Give a larger "
            f"{dataset.limit_flag}, or pairs that differ sooner."
        )
    if indices == list(range(len(indices))):
        rows = f"the first {len(lengths)} rows"
    else:
        rows = f"{len(lengths)} rows, the first of each source,"
    report = (
        f"{len(cut)} of {rows} are longer than {limit} and are cut "
        f"(longest: {max(lengths, default=0)} tokens)"
    )
    if num_ties:
        report += f"; {num_ties} of these pairs have two equal answers once cut, and teach nothing"
    return report
