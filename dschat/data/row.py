"""A row of text with the same fields for every dataset."""

from dataclasses import dataclass, field
from typing import Any

from dschat.data.messages import plain_text
from dschat.data.text_checks import shorten, strip_invisible

# An answer is a text, or the messages that follow the prompt, the first and last of the assistant.
Answer = str | list[dict]


@dataclass(frozen=True)
class Row:
    """A prompt with up to two answers."""

    # A text, or messages (see `messages`) that end with the user's or a tool's.
    prompt: str | list[dict]
    chosen: Answer | None = None
    rejected: Answer | None = None
    columns: dict = field(default_factory=dict)  # the raw row's other fields, for reward functions
    place: str = field(default="", compare=False)  # where it came from, for messages to the user
    tools: list | None = None  # descriptions of the functions that the assistant may call
    margin: float | None = None  # how much better chosen is, in the data's own unit


def add_leading_space(answer: Any) -> Any:
    """Put a space before an answer unless it begins with white space; None stays None."""
    if not isinstance(answer, str) or answer[:1].isspace():
        return answer
    return " " + answer


def validate_pair(row: Row) -> Row:
    """Return `row` if its two answers, if it has two, can be compared.

    Raises:
        ValueError: a rejected answer without a chosen one, or two that look the same.
    """
    if row.rejected is None:
        return row
    if row.chosen is None:
        raise ValueError('field "rejected" without a field "chosen"')
    if isinstance(row.chosen, str) and isinstance(row.rejected, str):
        equal = strip_invisible(row.chosen) == strip_invisible(row.rejected)
    else:
        equal = row.chosen == row.rejected
    if equal:
        raise ValueError(
            f'fields "chosen" and "rejected" are equal ({shorten(plain_text(row.chosen))}): no '
            "preference"
        )
    return row
