"""Datasets of tokenized rows.

A dataset encodes a row when it is read. `preparation.prepare` encodes all rows once, before
training; the dataset then reads them from the prepared table.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import datasets
import numpy as np
import pyarrow.compute
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dschat.config.options import TrainOn, Truncation
from dschat.data.encoding import Encoded, Encoder, trim_prompt
from dschat.data.row import Row
from dschat.data.templates import Rendered

IGNORED = -100
MIN_CUT_ANSWER = 2


class LeftOut(ValueError):
    """A row that is sound but not used; `kind` says why, for counting."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


class TextDataset(Dataset):
    """Base of the datasets: rows, an encoder, and a length limit.

    Args:
        rows: the rows, such as a `splits.Blend`.
        tokenizer: encodes prompts and answers.
        limit: the longest item in tokens.
        prompt_format: see `templates.TextFormat`.
        end_token_id: ends the answers that no chat template writes; None: the tokenizer's eos.
        truncation: what becomes of rows over the limit. "keep_prompt": the end of the answer is
            cut, and rows whose prompt leaves no room for an answer token are left out. "share":
            prompt and answer each keep at least half of the limit; the prompt loses its beginning
            (a leading BOS stays). "drop": they are left out. A cut answer has no end token, so that
            the model is not taught to stop there.
    """

    limit_flag = "--max_seq_len"
    # The fields of a prepared item that are lists of int, and those that are numbers.
    list_columns: tuple[str, ...] = ()
    number_columns: tuple[str, ...] = ()

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int,
        prompt_format: str,
        end_token_id: int | None = None,
        truncation: str = "keep_prompt",
    ):
        assert truncation in get_args(Truncation)
        self.rows = rows
        self.tokenizer = tokenizer
        self.limit = limit
        self.truncation = truncation
        self.encoder = Encoder(tokenizer, prompt_format=prompt_format, end_token_id=end_token_id)
        self.prepared: Sequence[dict] | None = None  # items, one for each of `rows`
        self.items_digest: str | None = None  # a hash of all prepared items, in their order
        self.stream: Any = None  # a `streams.Stream` whose rows are read during training
        # Of a weighted blend: see `loaders.ShardedSampler`.
        self.draws: Sequence[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        """Return item `index`.

        Raises:
            ValueError: the row cannot be shown in the prompt format, lacks an answer, or is left
                out (`LeftOut`). Never raised once the dataset is prepared.
        """
        if self.prepared is not None:
            return self.item(index, self.prepared[index])
        row = self.rows[index]
        return self.item(index, self.fit(row, self.encode(row)))

    def options(self) -> dict:
        """Return all options that decide what the prepared items are."""
        return {
            "limit": self.limit,
            "truncation": self.truncation,
            "format": self.encoder.format.prompt_format,
            "end": self.encoder.end_token_id,
        }

    def row(self, index: int) -> Row:
        """Return the row that item `index` is made of."""
        return self.rows[index]

    def select(self, indices: Sequence[int], rows: Sequence[Row]) -> None:
        """Keep only the items at `indices`, in place; `rows` are their rows."""
        self.rows = rows
        if self.prepared is not None:
            self.prepared = _select(self.prepared, indices)
            self.items_digest = None

    def lengths(self) -> np.ndarray:
        """Return the tokens [N, C] int64 of the C texts of all prepared items."""
        return self.column_lengths("input_ids")[:, None]

    def column_lengths(self, name: str) -> np.ndarray:
        """Return the lengths [N] int64 of a list column of all prepared items."""
        assert self.prepared is not None and name in self.list_columns
        if isinstance(self.prepared, datasets.Dataset):
            column = self.prepared.with_format("arrow")[:].column(name)
            return pyarrow.compute.list_value_length(column).to_numpy().astype(np.int64)
        return np.array([len(item[name]) for item in self.prepared], dtype=np.int64)

    @property
    def text_format(self) -> str:
        """The format of the first row: "plain", "human_assistant" or "chat"."""
        return self.encoder.format.describe(self.rows[0])

    @property
    def with_turns(self) -> bool:
        """Whether the assistant's earlier answers are needed."""
        return False

    def check(self, row: Row) -> None:
        """Raise ValueError, naming the row's place, if it lacks a text that this step needs."""

    def render(self, row: Row) -> Rendered:
        """Render a row as text; raise ValueError, naming its place, if that cannot be done."""
        self.check(row)
        return self.encoder.format.render(row, with_turns=self.with_turns)

    def encode(self, row: Row) -> Encoded:
        """Encode a row, before anything is cut."""
        return self.encoder.encode_all([self.render(row)])[0]

    def num_tokens(self, encoded: Encoded) -> int:
        """Return the length of an encoded row before truncation."""
        answers = [len(ids) for ids in (encoded.chosen, encoded.rejected) if ids is not None]
        return len(encoded.prompt) + max(answers, default=0)

    def fit(self, row: Row, encoded: Encoded) -> dict:
        """Return the prepared item of an encoded row: lists of int, and numbers.

        Raises:
            LeftOut: the row is not used.
        """
        raise NotImplementedError

    def item(self, index: int, prepared: dict) -> dict:
        """Return what the collate function gets of a prepared item."""
        return prepared

    def cut(self, prompt: list[int], num_answer: int) -> tuple[list[int], int]:
        """Cut a prompt by the rule of `truncation`.

        Args:
            prompt: its ids.
            num_answer: tokens of the (longer) answer.

        Returns:
            The prompt's ids, and the room that is left for an answer, at least 1.

        Raises:
            LeftOut: the row is not used.
        """
        num_all = len(prompt) + num_answer
        if num_all > self.limit and self.truncation == "drop":
            raise LeftOut(f"longer than {self.limit_flag} {self.limit}")
        if num_all > self.limit and self.truncation == "share":
            room = max(self.limit // 2, self.limit - num_answer)
            prompt = trim_prompt(prompt, room=room, num_lead=len(self.encoder.lead))
        room = self.limit - len(prompt)
        if room < 1:
            raise LeftOut(f"{self.limit_flag} {self.limit} has no room for an answer")
        return prompt, room


class SFTDataset(TextDataset):
    """Step 1: item = {"input_ids": [T], "labels": [T]}, both lists of int.

    Labels are -100 where nothing is learned.

    Args:
        rows: each with a chosen answer; reading an item without one raises ValueError.
        tokenizer: encodes prompts and answers.
        max_seq_len: the longest item in tokens.
        prompt_format: see `templates.TextFormat`.
        end_token_id: see `TextDataset`, as for `truncation`.
        truncation: what becomes of longer rows.
        train_on: what is learned. "all_assistant": every turn of the assistant; "last": the last
            one; "all": the prompt too.
    """

    list_columns = ("input_ids", "labels")

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_len: int,
        prompt_format: str,
        end_token_id: int | None = None,
        truncation: str = "keep_prompt",
        train_on: str = "all_assistant",
    ):
        assert train_on in get_args(TrainOn)
        super().__init__(
            rows,
            tokenizer,
            limit=max_seq_len,
            prompt_format=prompt_format,
            end_token_id=end_token_id,
            truncation=truncation,
        )
        self.train_on = train_on

    def options(self) -> dict:
        """Return all options that decide what the prepared items are."""
        return {**super().options(), "train_on": self.train_on}

    @property
    def with_turns(self) -> bool:
        """Whether the assistant's earlier answers are learned, too."""
        return self.train_on == "all_assistant"

    def check(self, row: Row) -> None:
        """Raise ValueError, naming the row's place, if it has no answer."""
        if row.chosen is None:
            raise ValueError(
                f"{row.place or 'a row'}: no answer to learn from; give chosen or response."
            )

    def render(self, row: Row) -> Rendered:
        """Render prompt and chosen answer: the rejected one is not read."""
        return super().render(replace(row, rejected=None))

    def fit(self, row: Row, encoded: Encoded) -> dict:
        """Return input_ids and labels."""
        prompt, room = self.cut(encoded.prompt, len(encoded.chosen))
        answer = encoded.chosen[:room]
        labels = [IGNORED] * len(encoded.prompt)
        if self.train_on == "all":
            labels = list(encoded.prompt)
        for begin, end in encoded.turns:
            labels[begin:end] = encoded.prompt[begin:end]
        labels = trim_prompt(labels, room=len(prompt), num_lead=len(self.encoder.lead))
        learned = answer if encoded.learns_answer else [IGNORED] * len(answer)
        labels += learned
        # A causal model predicts nothing for the first token.
        if all(label == IGNORED for label in labels[1:]):
            raise LeftOut("no turn in it is learned")
        return {"input_ids": prompt + answer, "labels": labels}


class PairDataset(TextDataset):
    """Step 2 and DPO: item = {"chosen_ids": [T], "rejected_ids": [T'], "num_prompt": P, "margin"}.

    Both are lists of int and begin with the same P prompt ids. "margin" is a float; 0 if the row
    has none.

    Args:
        rows: each with two answers; reading an item without them raises ValueError.
        tokenizer: encodes prompts and answers.
        max_seq_len: the longest item in tokens.
        prompt_format: see `templates.TextFormat`.
        end_token_id: see `TextDataset`, as for `truncation`.
        truncation: what becomes of longer rows. Pairs that are equal once cut are left out.
        cut_fraction: the share of pairs whose answers are both cut to one random number of tokens,
            without the end token. At least 2 tokens are left, and enough to keep the answers
            different. The reward model thus learns to score unfinished answers, and cannot take the
            end token itself for quality.
        seed: with the row's index, decides which pairs are cut, and where.
    """

    list_columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    number_columns = ("margin",)

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_len: int,
        prompt_format: str,
        end_token_id: int | None = None,
        truncation: str = "keep_prompt",
        cut_fraction: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(
            rows,
            tokenizer,
            limit=max_seq_len,
            prompt_format=prompt_format,
            end_token_id=end_token_id,
            truncation=truncation,
        )
        self.cut_fraction = cut_fraction
        self.seed = seed

    def check(self, row: Row) -> None:
        """Raise ValueError, naming the row's place, unless it has two answers."""
        if row.chosen is None or row.rejected is None:
            raise ValueError(
                f"{row.place or 'a row'}: no pair to compare; give chosen and rejected."
            )

    def lengths(self) -> np.ndarray:
        """Return the tokens [N, 2] int64 of the chosen and the rejected text of all prepared items.

        They are those before `cut_fraction` cuts any.
        """
        prompt = self.column_lengths("prompt_ids")
        answers = [self.column_lengths(name) for name in ("chosen_ids", "rejected_ids")]
        return np.stack([prompt + answer for answer in answers], axis=1)

    def fit(self, row: Row, encoded: Encoded) -> dict:
        """Return the ids of prompt and answers, and the pair's margin."""
        # Both get the same prompt: otherwise a shorter prompt would give away the longer answer.
        longest = max(len(encoded.chosen), len(encoded.rejected))
        prompt, room = self.cut(encoded.prompt, longest)
        chosen, rejected = encoded.chosen[:room], encoded.rejected[:room]
        if chosen == rejected:
            raise LeftOut("the two answers are equal once they are cut")
        return {
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "margin": float(row.margin or 0.0),
        }

    def item(self, index: int, prepared: dict) -> dict:
        """Return a pair as the collate function takes it, cut at random if it is chosen for it."""
        prompt, chosen, rejected = (
            prepared[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        length = self._cut_length(index, chosen[:-1], rejected[:-1])
        if length is not None:
            chosen, rejected = chosen[:length], rejected[:length]
        return {
            "chosen_ids": prompt + chosen,
            "rejected_ids": prompt + rejected,
            "num_prompt": len(prompt),
            "margin": prepared["margin"],
        }

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


class PromptDataset(TextDataset):
    """Step 3: item = {"input_ids": [P] list of int, "index": int}.

    Reading an item raises ValueError, naming the row, if its prompt has no tokens at all.

    Args:
        rows: only their prompts are used.
        tokenizer: encodes the prompts.
        max_prompt_len: the longest prompt in tokens.
        prompt_format: see `templates.TextFormat`.
        truncation: what becomes of longer prompts: with "share" they lose their beginning, else
            they are left out.
    """

    limit_flag = "--max_prompt_seq_len"
    list_columns = ("input_ids",)

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_len: int,
        prompt_format: str,
        truncation: str = "keep_prompt",
    ):
        super().__init__(
            rows,
            tokenizer,
            limit=max_prompt_len,
            prompt_format=prompt_format,
            truncation=truncation,
        )

    def render(self, row: Row) -> Rendered:
        """Render the prompt alone."""
        return self.encoder.format.render(Row(row.prompt, place=row.place, tools=row.tools))

    def fit(self, row: Row, encoded: Encoded) -> dict:
        """Return the prompt's ids."""
        if not encoded.prompt:
            raise ValueError(
                f"{row.place or 'a row'}: the prompt {row.prompt!r:.80} has no tokens, and "
                "generation needs at least one. Give the row a prompt, or remove it."
            )
        ids = encoded.prompt
        if len(ids) > self.limit:
            if self.truncation != "share":
                raise LeftOut(f"its prompt is longer than {self.limit_flag} {self.limit}")
            ids = trim_prompt(ids, room=self.limit, num_lead=len(self.encoder.lead))
        return {"input_ids": ids}

    def item(self, index: int, prepared: dict) -> dict:
        """Return a prompt with its row's number."""
        return {"input_ids": prepared["input_ids"], "index": index}

    def prompt_text(self, index: int) -> str:
        """Return the whole rendered prompt, even if its ids are cut."""
        return self.render(self.rows[index]).prompt

    def columns(self, index: int) -> dict:
        """Return the row's fields besides prompt and answers, for a Python reward function."""
        return self.rows[index].columns


def _select(items: Sequence[dict], indices: Sequence[int]) -> Sequence[dict]:
    if hasattr(items, "select"):
        return items.select(indices)
    return [items[index] for index in indices]
