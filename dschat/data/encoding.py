"""Tokenization that gives a conversation the same ids in every step."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dschat.data.row import Row
from dschat.data.templates import Rendered, TextFormat
from dschat.data.word_borders import last_word_border
from dschat.data.words import WordTokenizer


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
        self._words = WordTokenizer(tokenizer)

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
        return last_word_border(prompt) if self._words.splits else 0

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
        prompts = []
        found = self._words.tokenize_with_ranges(
            [row.prompt for row in rendered], [row.turns for row in rendered]
        )
        for ids, turns in found:
            prompt = self._with_lead(ids)
            shift = len(prompt) - len(ids)
            prompts.append((prompt, tuple((begin + shift, end + shift) for begin, end in turns)))
        return prompts

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self._words.tokenize(texts)


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
