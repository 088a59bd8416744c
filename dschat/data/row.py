"""A row of text with the same fields for every dataset, and the checks that every row passes."""

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field

ROLES = ("system", "user", "assistant")
# Unicode categories of white space, controls, and formats such as a zero-width space.
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
# Characters that Unicode counts as letters and marks but that draw nothing: Hangul fillers, Braille
# without dots, variation selectors.
MORE_INVISIBLE = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# A longer text is a whole file that got into a row by mistake. A novel has a quarter of a million
# tokens: all but the last --max_seq_len would be tokenized in every epoch only to be cut.
MAX_TEXT_BYTES = 1_000_000
ANSWER_FIELDS = ("chosen", "response")


@dataclass(frozen=True)
class Row:
    """A prompt with up to two answers."""

    prompt: str | list[dict]  # text, or messages of {"role", "content"} that end with the user's
    chosen: str | None = None
    rejected: str | None = None
    columns: dict = field(default_factory=dict)  # the raw row's other fields, for reward functions
    place: str = field(default="", compare=False)  # where it came from, for messages to the user


RowFunction = Callable[[dict], Row]


def row_from_columns(raw: dict) -> Row:
    """Build a row from the columns prompt and chosen, prompt and response, or messages.

    Each form may also have the column rejected. If `messages` ends with an assistant's message,
    that message is the chosen answer and those before it are the prompt. A field that is null
    counts as missing.

    Raises:
        ValueError: for a missing, wrongly typed or empty field, or two equal answers; says what to
            give instead.
    """
    if raw.get("messages") is not None:
        used, prompt, chosen = _split_conversation(raw)
    elif raw.get("prompt") is not None:
        prompt = _validate_prompt(raw["prompt"])
        answer_field = next((name for name in ANSWER_FIELDS if raw.get(name) is not None), None)
        chosen = validate_text(raw[answer_field], answer_field) if answer_field else None
        used = {"prompt", answer_field or "chosen"}
    else:
        raise ValueError(f'no field "prompt" or "messages" among {_shorten(sorted(map(str, raw)))}')
    rejected = None
    if raw.get("rejected") is not None:
        rejected = validate_text(raw["rejected"], "rejected")
    columns = {name: value for name, value in raw.items() if name not in used | {"rejected"}}
    return validate_pair(Row(prompt, chosen, rejected, columns))


def validate_text(value: object, name: str) -> str:
    """Return `value` if it is a usable text.

    A usable text is a string with at least one visible character that can be encoded as UTF-8, in
    at most MAX_TEXT_BYTES bytes.

    Args:
        value: the value of a field.
        name: the field's name, for messages.

    Raises:
        ValueError: `value` is no such text; names the field.
    """
    if not isinstance(value, str):
        raise ValueError(f'field "{name}" is {_shorten(value)}, not a string')
    try:
        _check_size(len(value.encode("utf-8")), name)
    except UnicodeEncodeError:
        # Invalid UTF-8 arrives as lone surrogates, as do broken \u escapes of JSON.
        raise ValueError(f'field "{name}" is not valid UTF-8: {_shorten(value)}') from None
    if not any(map(_is_visible, value)):
        raise ValueError(f'field "{name}" is empty ({_shorten(value)}); it needs at least one word')
    return value


def add_leading_space(answer: str | None) -> str | None:
    """Put a space before an answer unless it begins with white space; None stays None."""
    if answer is None or answer[0].isspace():
        return answer
    return " " + answer


def _check_size(num_bytes: int, name: str) -> None:
    if num_bytes > MAX_TEXT_BYTES:
        raise ValueError(
            f'field "{name}" has {num_bytes:,} bytes of text, and the limit is '
            f"{MAX_TEXT_BYTES:,}; split it into rows"
        )


def _is_visible(char: str) -> bool:
    return unicodedata.category(char) not in INVISIBLE and not MORE_INVISIBLE.match(char)


def _strip_invisible(text: str) -> str:
    """Remove invisible characters from both ends."""
    begin = next((i for i, char in enumerate(text) if _is_visible(char)), len(text))
    num_trailing = next(
        (i for i, char in enumerate(reversed(text)) if _is_visible(char)), len(text)
    )
    return text[begin : len(text) - num_trailing]


def validate_pair(row: Row) -> Row:
    """Return `row` if its two answers, if it has two, can be compared.

    Raises:
        ValueError: a rejected answer without a chosen one, or two that look the same.
    """
    if row.rejected is not None and row.chosen is None:
        raise ValueError('field "rejected" without a field "chosen"')
    if row.rejected is not None and _strip_invisible(row.rejected) == _strip_invisible(row.chosen):
        raise ValueError(
            f'fields "chosen" and "rejected" are equal ({_shorten(row.chosen)}): no preference'
        )
    return row


def _validate_prompt(prompt: object) -> str | list[dict]:
    if prompt == "":  # an answer to nothing can be learned, and steps that need a prompt check it
        return prompt
    if isinstance(prompt, list):
        return validate_messages(prompt, "prompt")
    return validate_text(prompt, "prompt")


def _split_conversation(raw: dict) -> tuple[set[str], list[dict], str | None]:
    """Split a row with `messages` into the names of the fields used, the prompt and the answer."""
    messages = raw["messages"]
    if isinstance(raw.get("chosen"), str):
        prompt = validate_messages(messages, "messages")
        chosen = validate_text(raw["chosen"], "chosen")
        return {"messages", "chosen"}, prompt, chosen
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return {"messages"}, validate_messages(messages, "messages"), None
    chosen = validate_text(last.get("content"), f"messages[{len(messages) - 1}].content")
    return {"messages"}, validate_messages(messages[:-1], "messages"), chosen


def validate_messages(messages: object, name: str) -> list[dict]:
    """Return `messages` reduced to role and content.

    Args:
        messages: a list of {"role", "content"} whose last message is the user's.
        name: the field's name, for messages to the user.

    Raises:
        ValueError: `messages` is no such list; names the field and the message.
    """
    if not isinstance(messages, list):
        raise ValueError(f'field "{name}" is {_shorten(messages)}, not a list of messages')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(
                f"{name}[{number}] is {_shorten(message)}, not a message with one of the roles "
                f"{', '.join(ROLES)}"
            )
        # An empty system message asks for no system prompt, since some templates bring their own.
        # An empty assistant message may have called a tool.
        content = message.get("content")
        if message["role"] == "user" or not isinstance(content, str) or content.strip():
            validate_text(content, f"{name}[{number}].content")
    _check_size(sum(len(message["content"].encode("utf-8")) for message in messages), name)
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(
            f'field "{name}" does not end with a message of the user for the assistant to answer: '
            f"{_shorten(messages)}"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _shorten(value: object) -> str:
    """Return `value` as JSON of at most 80 characters, safe to print."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
