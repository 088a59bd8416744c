"""Tokenization that gives a conversation the same ids in every step."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dschat.data.row import Row
from dschat.data.templates import Rendered, TextFormat
from dschat.data.word_borders import last_word_border, splits_at_words


@dataclass(frozen=True)
class Encoded:
    """A row as token ids, before anything is cut."""

    prompt: list[int]
    chosen: list[int] | None = None  # with its end token, as `rejected`
    rejected: list[int] | None = None
    # Positions [begin, end) of the prompt's ids that are earlier answers of the assistant.
    turns: tuple[tuple[int, int], ...] = ()
    num_hidden_turns: int = 0  # earlier answers that the template shows otherwise than written
    learns_answer: bool = True  # False: the chosen answer is context only


class Encoder:
    """Encodes rows: the prompt alone, and each answer after it.

    Args:
        tokenizer: of the model.
        prompt_format: see `templates.TextFormat`.
        end_token_id: ends the answers that no chat template writes. The template's own end of a
            turn ends the others.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_format: str,
        end_token_id: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.format = TextFormat(prompt_format, tokenizer)
        self.end_token_id = tokenizer.eos_token_id if end_token_id is None else end_token_id
        self.lead = leading_ids(tokenizer)
        self._splits_at_words = splits_at_words(tokenizer)

    def encode(self, row: Row, *, with_turns: bool = False) -> Encoded:
        """Encode one row.

        Args:
            row: prompt and answers.
            with_turns: find the assistant's earlier answers in the prompt, too.

        Raises:
            ValueError: the format cannot show the row; names its place.
        """
        rendered = self.format.render(row, with_turns=with_turns)
        return self.encode_all([rendered])[0]

    def encode_all(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Encode rendered rows; many at a time are faster."""
        prompts = self._encode_prompts(rendered)
        starts = [self._context_start(row.prompt) for row in rendered]
        texts = []
        for row, start in zip(rendered, starts, strict=True):
            context = row.prompt[start:]
            if start:
                texts.append(context)
            texts += [
                context + answer for answer in (row.chosen, row.rejected) if answer is not None
            ]
        ids = iter(self._tokenize(texts))
        found = []
        for row, start, (prompt, turns) in zip(rendered, starts, prompts, strict=True):
            context_ids = next(ids) if start else prompt
            chosen, rejected = (
                None if answer is None else self._answer(row, answer, context_ids, next(ids))
                for answer in (row.chosen, row.rejected)
            )
            encoded = Encoded(
                prompt, chosen, rejected, turns, row.num_hidden_turns, row.learns_answer
            )
            found.append(encoded)
        return found

    def encode_answer(self, row: Row, answer: str, *, ended: bool) -> list[int]:
        """Return the ids of `row`'s prompt and another answer.

        Args:
            row: its prompt is used.
            answer: the text of the answer.
            ended: end it by the end token.
        """
        rendered = self.format.render(Row(row.prompt, answer, place=row.place, tools=row.tools))
        encoded = self.encode_all([rendered])[0]
        ids = encoded.prompt + encoded.chosen
        return ids if ended else ids[:-1]

    def end_id(self, rendered: Rendered) -> int:
        """Return the token that ends the answers of a row."""
        if rendered.by_template and self.format.end_id is not None:
            return self.format.end_id
        return self.end_token_id

    def _context_start(self, prompt: str) -> int:
        """Return where the end of a prompt begins with which its answers are tokenized.

        0: all of it is needed. Otherwise the ids before that place are the same whatever follows.
        """
        return last_word_border(prompt) if self._splits_at_words else 0

    def _answer(
        self, rendered: Rendered, text: str, context: list[int], joint: list[int]
    ) -> list[int]:
        """Return the ids of an answer after a prompt.

        Prompt and answer are tokenized as one text. If a token spans the border between them, the
        answer is tokenized alone: step 3 tokenizes prompts alone and must see the ids that steps 1
        and 2 saw.

        Args:
            rendered: the row.
            text: the answer.
            context: ids of the prompt, or of its end (`_context_start`).
            joint: ids of the same text and the answer.
        """
        if context[: len(self.lead)] == self.lead:
            joint = self._with_lead(joint)
        ids = joint[len(context) :]
        if joint[: len(context)] != context:
            ids = self._tokenize([text])[0]
        end = self.end_id(rendered)
        return ids if ids[-1:] == [end] else [*ids, end]

    def _with_lead(self, ids: list[int]) -> list[int]:
        """Put the leading ids in front, unless a chat template has done so."""
        return ids if ids[: len(self.lead)] == self.lead else self.lead + ids

    def _encode_prompts(
        self, rendered: Sequence[Rendered]
    ) -> list[tuple[list[int], tuple[tuple[int, int], ...]]]:
        """Return the ids of each row's prompt, and where its earlier answers are in them."""
        needs_spans = [bool(row.turns) and self.tokenizer.is_fast for row in rendered]
        plain, marked = (
            [row.prompt for row, needs in zip(rendered, needs_spans, strict=True) if needs == kind]
            for kind in (False, True)
        )
        plain_ids = iter(self._tokenize(plain))
        marked_ids = iter(self._tokenize_with_spans(marked))
        prompts = []
        for row, needs in zip(rendered, needs_spans, strict=True):
            ids, spans = next(marked_ids) if needs else (next(plain_ids), None)
            prompt = self._with_lead(ids)
            prompts.append((prompt, self._turn_positions(row, spans, len(prompt) - len(ids))))
        return prompts

    def _turn_positions(
        self, rendered: Rendered, spans: list[tuple[int, int]] | None, shift: int
    ) -> tuple[tuple[int, int], ...]:
        """Return where the ranges of characters in `rendered.turns` are in the prompt's ids.

        Args:
            rendered: the row.
            spans: the characters of each id; None: the tokenizer does not tell them.
            shift: ids that were put in front.
        """
        if not rendered.turns:
            return ()
        if spans is None:
            borders = [place for turn in rendered.turns for place in turn]
            counts = [len(ids) for ids in self._tokenize([rendered.prompt[:at] for at in borders])]
            pairs = zip(counts[::2], counts[1::2], strict=True)
            return tuple((begin + shift, end + shift) for begin, end in pairs)
        # Tokens without characters, as some tokenizers add, are in no turn.
        tokens = [(i, b, e) for i, (b, e) in enumerate(spans) if e > b]
        begins = [b for _, b, _ in tokens]
        ends = [e for _, _, e in tokens]
        found = []
        for begin, end in rendered.turns:
            first = bisect.bisect_left(begins, begin)
            last = bisect.bisect_right(ends, end) - 1
            if first <= last:
                found.append((tokens[first][0] + shift, tokens[last][0] + 1 + shift))
        return tuple(found)

    def _tokenize_with_spans(self, texts: list[str]) -> list[tuple[list[int], list]]:
        if not texts:
            return []
        found = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: the tokenizer would warn about long texts, but they are cut after this.
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer adds before a text, such as BOS; often empty."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    begin = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:begin])


def trim_prompt(ids: list[int], *, room: int, num_lead: int) -> list[int]:
    """Cut a prompt to `room` ids: the leading ids, then as many of the last ids as fit.

    The `num_lead` leading ids are always kept, even if `room` is smaller.
    """
    if len(ids) <= room:
        return ids
    num_last = max(0, room - num_lead)
    return ids[:num_lead] + ids[len(ids) - num_last :]
