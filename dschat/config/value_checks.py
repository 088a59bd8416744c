"""Checks of option values.

Each check returns a list of problems: empty if the value is good, else one sentence that names the
flag and its value. Problems are collected and not raised, so that a user sees all of them at once.
"""

import dataclasses
import math
from typing import Any

SEEDS = 2**32  # numpy takes no larger ones
LARGEST_INTEGER = 2**63 - 1  # torch and Arrow count in 64 bits
LONGEST_NAME_BYTES = 255  # of a file or folder, on Linux
LONGEST_VALUE_BYTES = 4096  # of a path, on Linux
SHOWN = 40  # characters of a bad value that a message shows


def required(name: str, value: str) -> list[str]:
    """Check that a model is named."""
    if value:
        return []
    return [f"{name} is required: a model folder or a hub id."]


def zero_stage(name: str, value: int) -> list[str]:
    """Check that `value` is a ZeRO stage."""
    if value in (0, 1, 2, 3):
        return []
    return [f"{name} {value}: ZeRO has the stages 0, 1, 2 and 3."]


def at_least(name: str, value: float, low: float) -> list[str]:
    """Check that `value` is finite and >= `low`."""
    if value >= low and is_finite_number(value):
        return []
    return [f"{name} {value}: must be {_finite_hint(value)}at least {low}."]


def above(name: str, value: float, low: float) -> list[str]:
    """Check that `value` is finite and > `low`."""
    if value > low and is_finite_number(value):
        return []
    return [f"{name} {value}: must be {_finite_hint(value)}above {low}."]


def in_range(name: str, value: float, low: float, high: float) -> list[str]:
    """Check that `low` <= `value` <= `high`."""
    if low <= value <= high:
        return []
    return [f"{name} {value}: must be between {low} and {high}."]


def share(name: str, value: float, high: float) -> list[str]:
    """Check that 0 < `value` <= `high`."""
    return in_range(name, value, 0.0, high) or above(name, value, 0)


def seed_value(name: str, value: int) -> list[str]:
    """Check that `value` can seed the random generators."""
    return in_range(name, value, 0, SEEDS - 1)


def finite(name: str, value: float) -> list[str]:
    """Check that `value` is neither an infinity nor NaN."""
    if is_finite_number(value):
        return []
    return [f"{name} {value}: must be a finite number."]


def fields_at_least(group: Any, names: tuple[str, ...], low: float) -> list[str]:
    """Check that each of the fields `names` of an option group is finite and >= `low`."""
    found = []
    for name in names:
        found += at_least(f"--{name}", getattr(group, name), low)
    return found


def fields_above(group: Any, names: tuple[str, ...], low: float) -> list[str]:
    """Check that each of the fields `names` of an option group is finite and > `low`."""
    found = []
    for name in names:
        found += above(f"--{name}", getattr(group, name), low)
    return found


def is_finite_number(value: float) -> bool:
    """Return whether `value` is neither an infinity nor NaN."""
    # math.isfinite would fail on an int that is too large for a float.
    return isinstance(value, int) or math.isfinite(value)


def integers_in_64_bits(group: Any) -> list[str]:
    """Check that no integer of an option group is too large for 64 bits."""
    found = []
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            found.append(
                f"--{field.name} {shortened(value)}: must be between "
                f"-{LARGEST_INTEGER} and {LARGEST_INTEGER}."
            )
    return found


def usable_text(name: str, value: str) -> list[str]:
    """Check that `value`, as it was typed, can be a number, a name or a path."""
    if value == "--":
        return [f"{name} --: this is no value. Give one, or leave {name} out."]
    if "\0" in value:
        return [f"{name} {ascii(shortened(value))}: holds a NUL character. Type it again."]
    try:
        encoded = value.encode()
    except UnicodeEncodeError:  # the system's name of a file in another encoding, or "\ud800"
        return [
            f"{name} {ascii(shortened(value))}: is not valid UTF-8. Rename the file or folder, or "
            "type the value again."
        ]
    if len(encoded) > LONGEST_VALUE_BYTES:
        return [
            f"{name} {shortened(value)}: has {len(encoded)} bytes, and the limit is "
            f"{LONGEST_VALUE_BYTES}."
        ]
    if max(len(part) for part in encoded.split(b"/")) > LONGEST_NAME_BYTES:
        return [
            f"{name} {shortened(value)}: no file or folder has a name of more than "
            f"{LONGEST_NAME_BYTES} bytes."
        ]
    return []


def shortened(value: object) -> str:
    """Return `value` as text, cut to its first characters if it is long."""
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _finite_hint(value: float) -> str:
    return "" if is_finite_number(value) else "a finite number, "
