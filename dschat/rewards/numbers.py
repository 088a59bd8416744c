"""Numbers in texts, read exactly."""

import re
from dataclasses import dataclass
from fractions import Fraction

MARK = "####"  # GSM8K's mark before the final result

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# An exponent has at most two digits: the value of a longer one would not fit in memory.
_EXPONENT = r"(?:[eE][+-]?\d{1,2}(?!\d))?"
# A minus after a word or a bracket subtracts.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)])[-−])?\$?(?P<top>{_UNSIGNED}){_EXPONENT.replace('(?:', '(?P<power>', 1)}"
    rf"(?:\s?/\s?(?P<bottom>{_UNSIGNED}))?(?P<percent>\s?\\?%)?"
)


@dataclass(frozen=True)
class Number:
    """A number as it is written: 50% has the value 50 and is a percentage."""

    value: Fraction
    is_percentage: bool = False


def last_number(text: str) -> Number | None:
    """Return the last number of `text`; None if there is none.

    If the text has "####", only what comes after the last one is read. Commas between groups of
    three digits are thousands separators, a/b is a fraction, and $ is skipped.
    """
    numbers = list(_NUMBER.finditer(text.rpartition(MARK)[2]))
    if not numbers:
        return None
    found = numbers[-1]
    try:
        value = Fraction(found["top"].replace(",", "") + (found["power"] or ""))
        if found["bottom"]:
            value /= Fraction(found["bottom"].replace(",", ""))
    except (ValueError, ZeroDivisionError):  # thousands of digits, or a fraction over 0
        return None
    return Number(-value if found["sign"] else value, bool(found["percent"]))


def same_number(one: Number, other: Number, *, tolerance: Fraction = Fraction(0)) -> bool:
    """Return whether two numbers differ by at most `tolerance`.

    A percentage equals the plain number of the same digits and its hundredth: 50% equals 50 and
    0.5. Two percentages are compared as they are.
    """
    if abs(one.value - other.value) <= tolerance:
        return True
    if one.is_percentage == other.is_percentage:
        return False
    plain, percentage = (other, one) if one.is_percentage else (one, other)
    return abs(plain.value - percentage.value / 100) <= tolerance
