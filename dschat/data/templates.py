"""Formats that render a row as text: plain, Human/Assistant, or the tokenizer's chat template.

The chat template alone says how a turn begins and ends. Each answer is what the template writes
after the prompt; the text between is found by rendering with and without it.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dschat.data.row import Answer, Row, add_leading_space
from dschat.data.text_checks import shorten
from dschat.models.turn_end import PROBE, split_turn_end, turn_end

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
IN_FORM = re.compile(r"\s*Human:.*Assistant:\s*", re.DOTALL)
# White space without line ends, since each line end may begin a turn itself: matching them here
# would make the time grow with the square of their number.
TURN = re.compile(r"(?:^|\n)[^\S\n]*(Human|Assistant):")
# Messages of a conversation whose earlier answers are learned. Finding them takes time that grows
# with the square of their number: seconds for so many.
MAX_MESSAGES = 1000
OPEN_THOUGHT = "<think>"
CLOSED_THOUGHT = "\n</think>\n\n"
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# The Human/Assistant format as a chat template, for a base model that was trained on messages.
HUMAN_ASSISTANT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '\n\nHuman: ' }}"
    "{% elif m['role'] == 'assistant' %}{{ '\n\nAssistant: ' }}{% endif %}"
    "{{ m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Rendered:
    """A row as the texts that a model reads.

    Prompt and answer are joined without anything between them. An answer's end token is not in its
    text: see `by_template`.
    """

    prompt: str
    chosen: str | None
    rejected: str | None
    # Whether the chat template wrote it, so that its end of a turn ends the answer; otherwise the
    # tokenizer's end token does.
    by_template: bool
    # Character ranges [begin, end) of the prompt that are earlier answers of the assistant.
    turns: tuple[tuple[int, int], ...] = ()
    # Earlier answers that the template shows otherwise than the assistant wrote them.
    num_hidden_turns: int = 0
    learns_answer: bool = True  # False: the chosen answer is context only


class TextFormat:
    r"""Renders rows in one format, with one tokenizer's chat template.

    Args:
        prompt_format: one of

            - "plain": prompt and answers unchanged.
            - "human_assistant": "\n\nHuman: ...\n\nAssistant:" and " answer". A prompt already
              in that form is unchanged.
            - "chat": the tokenizer's chat template with its generation prompt. A string prompt
              becomes the turns of a Human/Assistant text, or one message of the user.
            - "auto": messages use the chat template if the tokenizer has one, else
              human_assistant; strings are plain.
        tokenizer: has the chat template.

    Raises:
        ValueError: "chat", and the tokenizer has no template.
    """

    def __init__(self, prompt_format: str, tokenizer: PreTrainedTokenizerBase):
        self.prompt_format = prompt_format
        self.tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        if prompt_format == "chat" and not self.has_template:
            raise ValueError(
                f"--prompt_format chat: the tokenizer in {tokenizer.name_or_path or 'use'} has no "
                "chat template. Give human_assistant, plain or auto, or a model whose tokenizer "
                "has one."
            )
        self.end_text = turn_end(tokenizer)
        # The token that ends an answer, and what the template writes between it and the words:
        # a space in Llama-2's. Without a token, the words of the end are learned, and then eos.
        self.end_id, self.end_lead = split_turn_end(tokenizer)
        self._marks_turns = self.has_template and bool(
            GENERATION_MARK.search(str(tokenizer.chat_template))
        )

    def resolve(self, row: Row) -> str:
        """Return the format of `row`: "plain", "human_assistant" or "chat"."""
        if self.prompt_format != "auto":
            return self.prompt_format
        if isinstance(row.prompt, str):
            is_conversation = isinstance(row.chosen, list) and row.chosen
            return self._conversation_format() if is_conversation else "plain"
        return self._conversation_format()

    def describe(self, row: Row) -> str:
        """Return the format that a row's text has, even if it came as that text."""
        kind = self.resolve(row)
        if kind == "plain" and isinstance(row.prompt, str) and IN_FORM.fullmatch(row.prompt):
            return "human_assistant"
        return kind

    def render(self, row: Row, *, with_turns: bool = False) -> Rendered:
        """Render a row.

        Args:
            row: prompt and answers.
            with_turns: find the assistant's earlier answers in the prompt, too.

        Raises:
            ValueError: the format cannot show the row or a part of it; names the row's place.
        """
        kind = self.resolve(row)
        if kind == "chat":
            rendered = self._render_chat(row, with_turns)
        else:
            rendered = self._render_text(row, kind, with_turns)
        is_context = isinstance(row.chosen, list) and not row.chosen[-1].get("learn", True)
        return replace(rendered, learns_answer=False) if is_context else rendered

    def _render_text(self, row: Row, kind: str, with_turns: bool) -> Rendered:
        if row.tools or _has_calls(row):
            raise ValueError(
                f"{row.place or 'a row'}: it has tools or tool calls, and --prompt_format {kind} "
                "cannot show them. Give a model whose chat template does, or leave such rows out "
                "with --skip_bad_rows."
            )
        if kind == "plain":
            return _render_plain(row)
        if with_turns and not self.tokenizer.is_fast and isinstance(row.prompt, list):
            _check_number(row.prompt, row.place)
        return _render_human_assistant(row, with_turns)

    def _conversation_format(self) -> str:
        return "chat" if self.has_template else "human_assistant"

    def _render_chat(self, row: Row, with_turns: bool) -> Rendered:
        place = row.place or "a row"
        try:
            return self._render_by_template(row, with_turns)
        except _TemplateRefusal as refusal:
            raise ValueError(
                f"{place}: the tokenizer's chat template refuses it ({refusal}). Fix the row, "
                "remove it, or give --prompt_format human_assistant."
            ) from refusal
        except _NotShown as missing:
            raise ValueError(
                f"{place}: it has {missing}, and the tokenizer's chat template does not show it. "
                "Give a model whose template does, or leave such rows out with --skip_bad_rows."
            ) from missing

    def _render_by_template(self, row: Row, with_turns: bool) -> Rendered:
        messages = parse_turns(row.prompt) if isinstance(row.prompt, str) else row.prompt
        if with_turns and not self._marks_turns:
            _check_number(messages, row.place)
        messages = self._place_system(messages)
        prompt = self._apply(messages, row.tools, open_answer=True)
        if row.tools and self._apply(messages, None, open_answer=True) == prompt:
            raise _NotShown("a field tools")
        _check_calls(messages, prompt)
        turns: tuple = ()
        num_hidden = 0
        if with_turns:
            turns, num_hidden = self._find_turns(messages, row.tools, prompt)
        answers = [
            self._render_answer(messages, answer, prompt, row.tools) if answer is not None else None
            for answer in (row.chosen, row.rejected)
        ]
        return Rendered(prompt, answers[0], answers[1], True, turns, num_hidden)

    def _place_system(self, messages: list[dict]) -> list[dict]:
        """Put the system prompt before the user's first words if the template cannot show it."""
        has_system = len(messages) > 1 and messages[0]["role"] == "system"
        if not has_system or not messages[0]["content"].strip() or self._shows_system:
            return messages
        first = messages[1]
        content = f"{messages[0]['content']}\n\n{first['content']}"
        return [{**first, "content": content}, *messages[2:]]

    @cached_property
    def _shows_system(self) -> bool:
        messages = [{"role": role, "content": PROBE} for role in ("system", "user")]
        try:
            return self._apply(messages, None).count(PROBE) == 2
        except _TemplateRefusal:
            return False

    def _render_answer(
        self, messages: list[dict], answer: Answer, prompt: str, tools: list | None
    ) -> str:
        """Return the template's text of an answer, up to its end token."""
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        full = self._apply([*messages, *turns], tools)
        last = turns[-1]
        opens_thought = prompt.rstrip().endswith(OPEN_THOUGHT)
        thought = last.get("reasoning_content")
        if thought and (opens_thought or thought.strip() not in full):
            # The template has no place for thoughts: write it where the model will write it.
            last = {**last, "content": _with_thought(last)}
            del last["reasoning_content"]
            turns = [*turns[:-1], last]
            thought = None
            full = self._apply([*messages, *turns], tools)
        _check_calls(turns, full)
        is_text = len(turns) == 1 and "tool_calls" not in last
        if is_text and (opens_thought or not full.startswith(prompt)):
            return _continue_thought(prompt, last["content"]) + self.end_lead
        if not full.startswith(prompt):
            raise _NotShown("tool calls after a prompt that the template writes in two ways")
        text = self._cut_end(full[len(prompt) :])
        if is_text and not thought:
            text = _restore_words(text, last["content"])
        return text + self.end_lead

    def _cut_end(self, body: str) -> str:
        """Return an answered turn without the end that the template gives every turn."""
        if self.end_text and body.endswith(self.end_text):
            return body[: -len(self.end_text)]
        stripped = body.rstrip()
        end = self.end_text.strip()
        return stripped.removesuffix(end) if end and stripped.endswith(end) else body

    def _find_turns(
        self, messages: list[dict], tools: list | None, prompt: str
    ) -> tuple[tuple[tuple[int, int], ...], int]:
        """Find the assistant's earlier answers in the prompt, each with its end token."""
        wanted = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("learn", True)
        ]
        if not wanted:
            return (), 0
        if self._marks_turns:
            return self._marked_turns(messages, tools, wanted)
        spans = []
        for index in wanted:
            begin = self._apply(messages[:index], tools, open_answer=True)
            end = self._apply(messages[: index + 1], tools)
            if prompt.startswith(begin) and prompt.startswith(end) and len(end) > len(begin):
                # White space after the end token belongs to the next turn.
                spans.append((len(begin), len(end) - self._num_after_end(end)))
        return tuple(spans), len(wanted) - len(spans)

    def _marked_turns(
        self, messages: list[dict], tools: list | None, wanted: list[int]
    ) -> tuple[tuple[tuple[int, int], ...], int]:
        """Take the assistant's turns from the template's own generation marks."""
        _, marked = render_jinja_template(
            [_visible(messages)],
            tools=tools,
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=True,
            **self.tokenizer.special_tokens_map,
        )
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = list(marked[0])
        if len(spans) != len(answers):
            return tuple(spans), max(0, len(wanted) - len(spans))
        learned = set(wanted)
        kept = [tuple(span) for i, span in zip(answers, spans, strict=True) if i in learned]
        return tuple(kept), 0

    def _num_after_end(self, text: str) -> int:
        """Return the characters that the template writes after the end of a turn."""
        if not text.endswith(self.end_text):
            return 0
        return len(self.end_text) - len(self.end_text.rstrip())

    def _apply(self, messages: list[dict], tools: list | None, *, open_answer: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                _visible(messages), tools=tools, tokenize=False, add_generation_prompt=open_answer
            )
        except jinja2.TemplateError as error:
            raise _TemplateRefusal(str(error)) from error
        except Exception as error:  # a template is a program: it may divide by zero, too
            raise _TemplateRefusal(f"{type(error).__name__}: {error}") from error


class _TemplateRefusal(Exception):
    """The template raised an error."""


class _NotShown(Exception):
    """The template leaves something out that the row says."""


def parse_turns(text: str) -> list[dict]:
    """Parse a prompt into messages: the turns of a Human/Assistant text, or one user message."""
    if not IN_FORM.fullmatch(text):
        return [{"role": "user", "content": text.strip()}]
    text = text.rstrip().removesuffix("Assistant:")
    marks = list(TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {
            "role": "user" if mark.group(1) == "Human" else "assistant",
            "content": text[mark.end() : end].strip(),
        }
        for mark, end in zip(marks, ends, strict=False)
    ]


def _render_plain(row: Row) -> Rendered:
    if not isinstance(row.prompt, str):
        raise ValueError(
            f"{row.place or 'a row'}: --prompt_format plain cannot show messages; give auto or "
            "another format."
        )
    return Rendered(row.prompt, _one_text(row.chosen), _one_text(row.rejected), False)


def _render_human_assistant(row: Row, with_turns: bool) -> Rendered:
    prompt = row.prompt
    turns: tuple = ()
    if not isinstance(prompt, str):
        prompt, turns = _write_dialogue(prompt)
    elif not IN_FORM.fullmatch(prompt):
        prompt = f"{HUMAN} {prompt.strip()}{ASSISTANT}"
    answers = [add_leading_space(_one_text(answer)) for answer in (row.chosen, row.rejected)]
    return Rendered(prompt, answers[0], answers[1], False, turns if with_turns else ())


def _write_dialogue(messages: list[dict]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Write messages as a Human/Assistant text; return it and its learned answers' ranges."""
    # The form has no name for the system: its message comes without one.
    names = {"system": "", "user": HUMAN, "assistant": ASSISTANT, "tool": f"{HUMAN} (tool)"}
    text = ""
    turns = []
    for message in messages:
        text += names[message["role"]]
        begin = len(text)
        words = message["content"].strip()
        text += words if message["role"] == "system" else f" {words}"
        if message["role"] == "assistant" and message.get("learn", True):
            turns.append((begin, len(text)))
    return text + ASSISTANT, tuple(turns)


def _one_text(answer: Answer | None) -> str | None:
    """Return an answer as text, with its thought as it would stand there."""
    if answer is None or isinstance(answer, str):
        return answer
    if len(answer) == 1:
        has_thought = answer[0].get("reasoning_content")
        return _with_thought(answer[0]) if has_thought else answer[0]["content"]
    return _write_dialogue(answer)[0].removeprefix(ASSISTANT).removesuffix(ASSISTANT)


def _with_thought(message: dict) -> str:
    """Return a message's thought and words as one text."""
    return (
        f"{OPEN_THOUGHT}\n{message['reasoning_content'].strip()}{CLOSED_THOUGHT}"
        f"{message['content']}"
    )


def _check_number(messages: list[dict], place: str | None) -> None:
    if len(messages) > MAX_MESSAGES:
        raise ValueError(
            f"{place or 'a row'}: it has {len(messages):,} messages, and the limit for learning "
            f"all answers is {MAX_MESSAGES:,}. Split it into rows, give --train_on last, or leave "
            "such rows out with --skip_bad_rows."
        )


def _check_calls(messages: list[dict], text: str) -> None:
    calls = (call for message in messages for call in message.get("tool_calls", ()))
    for name in {call["function"]["name"]: None for call in calls}:
        if name not in text:
            raise _NotShown(f"a call of the function {shorten(name)}")


def _continue_thought(prompt: str, content: str) -> str:
    """Return an answer after a prompt that may already have opened its thought."""
    if not prompt.rstrip().endswith(OPEN_THOUGHT):
        return content
    opened = prompt[prompt.rindex(OPEN_THOUGHT) + len(OPEN_THOUGHT) :]
    if content.lstrip().startswith(OPEN_THOUGHT):
        rest = content.lstrip()[len(OPEN_THOUGHT) :]
        return rest.removeprefix(opened)
    # No thought: it is closed again before the answer.
    return CLOSED_THOUGHT.removeprefix(opened) + content


def _restore_words(text: str, content: str) -> str:
    """Return the template's answer with the white space around it that the template stripped."""
    for words in (content, content.lstrip(), content.rstrip(), content.strip()):
        if text.endswith(words):
            return text[: len(text) - len(words)] + content
    # Some templates take a thought out of the content and write it again in their own way. Others
    # change or drop the words: then the words themselves are the answer.
    answer = content.partition("</think>")[2]
    return text if answer and _words(answer) in _words(text) else content


def _words(text: str) -> str:
    return "".join(text.split())


def _visible(messages: list[dict]) -> list[dict]:
    """Return messages without the fields that are ours."""
    return [
        {name: value for name, value in message.items() if name != "learn"} for message in messages
    ]


def _has_calls(row: Row) -> bool:
    turns = [row.prompt, row.chosen, row.rejected]
    return any(
        "tool_calls" in message for turn in turns if isinstance(turn, list) for message in turn
    )
