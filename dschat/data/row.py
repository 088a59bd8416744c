"""One row of text, whatever the data set called its columns, and the checks that every row passes."""

import json
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Callable

ROLES = ("system", "user", "assistant")
# White space, controls, and formats such as a zero-width space; then what Unicode counts as letters and marks though
# nothing is drawn: fillers of Hangul, Braille without dots, variation selectors.
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
MORE_INVISIBLE = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# A text of this size is a file that got into a row by mistake: a novel, a quarter of a million tokens, of which all but
# the --max_seq_len last would be tokenised in every epoch only to be cut off.
MAX_TEXT_BYTES = 1_000_000
ANSWER_FIELDS = ("chosen", "response")


@dataclass(frozen=True)
class Row:
    """A prompt with up to two answers."""

    prompt: str | list[dict]  # text, or messages of {"role", "content"} that end with the user's
    chosen: str | None = None
    rejected: str | None = None
    columns: dict = field(
        default_factory=dict
    )  # all other fields of the raw row, for reward functions
    place: str = field(default="", compare=False)  # where it came from, for messages to the user


RowFunction = Callable[[dict], Row]


def row_from_columns(raw: dict) -> Row:
    """The row of the columns prompt and chosen, prompt and response, or messages, each with or without rejected.

    Where `messages` ends with the assistant's, that message is the chosen answer and those before are the prompt.
    A field that is null counts as missing.

    Raises:
        ValueError: for a missing, wrongly typed or empty field, or two equal answers; says what to give instead.
    """
    if raw.get("messages") is not None:
        used, prompt, chosen = _conversation(raw)
    elif raw.get("prompt") is not None:
        prompt = raw["prompt"]
        if prompt != "":  # an answer to nothing can be learned, and steps that need a prompt say so
            prompt = (
                checked_messages(prompt, "prompt")
                if isinstance(prompt, list)
                else checked_text(prompt, "prompt")
            )
        answer_field = next((name for name in ANSWER_FIELDS if raw.get(name) is not None), None)
        chosen = checked_text(raw[answer_field], answer_field) if answer_field else None
        used = {"prompt", answer_field or "chosen"}
    else:
        raise ValueError(f'no field "prompt" or "messages" among {_short(sorted(map(str, raw)))}')
    rejected = (
        checked_text(raw["rejected"], "rejected") if raw.get("rejected") is not None else None
    )
    columns = {name: value for name, value in raw.items() if name not in used | {"rejected"}}
    return checked_pair(Row(prompt, chosen, rejected, columns))


def checked_text(value: object, name: str) -> str:
    """`value`, if it is a text of which something can be seen, can be written as UTF-8, and of at most MAX_TEXT_BYTES
    bytes; else a ValueError that names the field.
    """
    if not isinstance(value, str):
        raise ValueError(f'field "{name}" is {_short(value)}, not a text')
    try:
        _check_size(len(value.encode("utf-8")), name)
    except UnicodeEncodeError:
        # Bytes that are no UTF-8 arrive as lone surrogates, as do broken \\u escapes of JSON.
        raise ValueError(f'field "{name}" is not valid UTF-8: {_short(value)}') from None
    if not any(map(_is_visible, value)):
        raise ValueError(f'field "{name}" is empty ({_short(value)}); it needs at least one word')
    return value


def _check_size(num_bytes: int, name: str) -> None:
    if num_bytes > MAX_TEXT_BYTES:
        raise ValueError(
            f'field "{name}" is a text of {num_bytes:,} bytes, and the most is {MAX_TEXT_BYTES:,}; split it into rows'
        )


def _is_visible(char: str) -> bool:
    return unicodedata.category(char) not in INVISIBLE and not MORE_INVISIBLE.match(char)


def _visible_part(text: str) -> str:
    """`text` without what cannot be seen at its ends."""
    seen = [
        next((i for i, char in enumerate(way) if _is_visible(char)), len(text))
        for way in (text, reversed(text))
    ]
    return text[seen[0] : len(text) - seen[1]]


def checked_pair(row: Row) -> Row:
    """`row`, if its answers can be compared; else a ValueError."""
    if row.rejected is not None and row.chosen is None:
        raise ValueError('field "rejected" without a field "chosen"')
    if row.rejected is not None and _visible_part(row.rejected) == _visible_part(row.chosen):
        raise ValueError(
            f'fields "chosen" and "rejected" are equal ({_short(row.chosen)}): no preference'
        )
    return row


def _conversation(raw: dict) -> tuple[set[str], list[dict], str | None]:
    """The names of the fields used, the prompt's messages and the chosen answer of a row with `messages`."""
    messages = raw["messages"]
    if isinstance(raw.get("chosen"), str):
        return (
            {"messages", "chosen"},
            checked_messages(messages, "messages"),
            checked_text(raw["chosen"], "chosen"),
        )
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return {"messages"}, checked_messages(messages, "messages"), None
    chosen = checked_text(last.get("content"), f"messages[{len(messages) - 1}].content")
    return {"messages"}, checked_messages(messages[:-1], "messages"), chosen


def checked_messages(messages: object, name: str) -> list[dict]:
    """`messages`, reduced to role and content, if they are such and end with the user's; else a ValueError."""
    if not isinstance(messages, list):
        raise ValueError(f'field "{name}" is {_short(messages)}, not a list of messages')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(
                f"{name}[{number}] is {_short(message)}, not a message with a role of {', '.join(ROLES)}"
            )
        # An empty message of the system is how one says that there is none, since some templates have one of their own; an
        # empty turn of the assistant may have called a tool.
        content = message.get("content")
        if message["role"] == "user" or not isinstance(content, str) or content.strip():
            checked_text(content, f"{name}[{number}].content")
    _check_size(sum(len(message["content"].encode("utf-8")) for message in messages), name)
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(
            f'field "{name}" has no message of the user for the assistant to answer: {_short(messages)}'
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _short(value: object) -> str:
    """`value` as JSON of at most 80 characters, safe to print."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
