"""Checks of single texts, shared by all forms of rows."""

import json
import re
import unicodedata

# Unicode categories of white space, controls, and formats such as a zero-width space.
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
# Characters that Unicode counts as letters and marks but that draw nothing: Hangul fillers, Braille
# without dots, variation selectors.
MORE_INVISIBLE = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
PLAIN = re.compile(r"[!-~]")  # most texts begin and end with one of these visible characters
# A longer text is a whole file that got into a row by mistake. A novel has a quarter of a million
# tokens: nearly all of them would be tokenized only to be cut.
MAX_TEXT_BYTES = 1_000_000


def validate_text(value: object, name: str) -> str:
    """Return `value` if it is a usable text; a whole number becomes its digits.

    A usable text is a string with at least one visible character that can be encoded as UTF-8, in
    at most MAX_TEXT_BYTES bytes.

    Args:
        value: the value of a field.
        name: the field's name, for messages.

    Raises:
        ValueError: `value` is no such text; names the field.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f'field "{name}" is {shorten(value)}, not a string')
    try:
        check_size(len(value) if value.isascii() else len(value.encode("utf-8")), name)
    except UnicodeEncodeError:
        # Invalid UTF-8 arrives as lone surrogates, as do broken \u escapes of JSON.
        raise ValueError(f'field "{name}" is not valid UTF-8: {shorten(value)}') from None
    if not PLAIN.search(value) and not any(map(_is_visible, value)):
        raise ValueError(f'field "{name}" is empty ({shorten(value)}); it needs at least one word')
    return value


def check_size(num_bytes: int, name: str) -> None:
    """Raise ValueError, naming the field, if a text has more than MAX_TEXT_BYTES bytes."""
    if num_bytes > MAX_TEXT_BYTES:
        raise ValueError(
            f'field "{name}" has {num_bytes:,} bytes of text, and the limit is '
            f"{MAX_TEXT_BYTES:,}; split it into rows"
        )


def strip_invisible(text: str) -> str:
    """Remove invisible characters from both ends."""
    text = text.strip()
    if PLAIN.match(text[:1]) and PLAIN.match(text[-1:]):
        return text
    begin = next((i for i, char in enumerate(text) if _is_visible(char)), len(text))
    num_trailing = next(
        (i for i, char in enumerate(reversed(text)) if _is_visible(char)), len(text)
    )
    return text[begin : len(text) - num_trailing]


def shorten(value: object) -> str:
    """Return `value` as JSON of at most 80 characters, safe to print."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def describe_fault(error: BaseException) -> str:
    """Describe an error in one line without its final full stop."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    if isinstance(error, RecursionError):
        text = "lists or objects are nested too deeply"
    return " ".join(text.split()).rstrip(".")[:500]


def _is_visible(char: str) -> bool:
    return unicodedata.category(char) not in INVISIBLE and not MORE_INVISIBLE.match(char)
