"""Checks of option values.

Each check returns a list of problems: empty if the value is good, else one sentence that names the
flag and its value. Problems are collected and not raised, so that a user sees all of them at once.
"""

import math
from typing import Any

SEEDS = 2**32  # numpy takes no larger ones


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


def _finite_hint(value: float) -> str:
    return "" if is_finite_number(value) else "a finite number, "
